"""Server-sent events: encoding, and a response that ends when its reader goes away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from momaserve.errors import MomaserveError
from momaserve_server.errors import wire_error

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def encode_event(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One event. JSON escapes line breaks, so one `data:` line always does."""
    payload = _JSON.encode(data).encode()
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + payload + b"\n\n"


async def with_error_event(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """`events`; an error among them becomes an `error` event followed by [DONE].

    The status line is long sent by then, so this is how a stream tells of a failure.
    """
    try:
        async for event in events:
            yield event
    except Exception as error:
        if not isinstance(error, MomaserveError):
            logger.exception("unexpected error in a stream")
        yield encode_event(wire_error(error).body(), "error")
        yield DONE
    finally:
        await events.aclose()


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Result of `work`, which is cancelled when the client closes the connection.

    Call it after the request's body has been read.

    Raises:
        ClientDisconnect: the client went away first.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(Response):
    """Streams encoded events. Owns them: closes them, and calls `close`, however it ends.

    `close` is apart from `events` because closing a generator that was never started runs
    none of its code.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = with_error_event(events)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except (ClientDisconnect, OSError):
            pass  # nobody is left to tell
        finally:
            await self._events.aclose()
            self._close()

    async def _send_all(self, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
