"""What became of one HTTP request: filled while it is served, told to listeners at its end.

Holds counts, times and reasons, and nothing of what was asked or answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from momaserve.outputs import FinishReason, RequestStats, TokenOutput
from momaserve.sampling import SamplingParams

CLIENT_CLOSED_REQUEST = 499
MAX_PATH_CHARS = 200
TRACE_HEADERS = ("traceparent", "tracestate")


class Usage(Protocol):
    """Tokens of a request, counted on while it runs."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One HTTP request. Lives on the event loop; its owner is `RecordMiddleware`.

    Routes that generate fill it through `begin`, `hear` and `end_choice`; it has no `usage`
    where nothing was generated.
    """

    method: str = ""
    path: str = ""
    """Percent-encoded, never with a query."""
    client: str | None = None
    """Address of whoever is at the other end of the connection."""
    trace_headers: dict[str, str] = field(default_factory=dict)
    """W3C trace context, as it was sent."""
    started_ns: int = field(default_factory=time.time_ns)
    """Unix time in nanoseconds."""
    duration_s: float = 0.0
    status: int | None = None
    """Of the answer; 499 if the client went away before its end."""
    request_id: str | None = None
    error_code: str | None = None
    """`code` of the error that it was answered with, or that ended its stream."""

    reply_id: str | None = None
    params: SamplingParams | None = None
    usage: Usage | None = None
    first_token_s: float | None = None
    """Arrival of the request to its first token, seen from the event loop."""
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)
    """By choice; those that were still running when the client went away are not there."""
    stats: list[RequestStats] = field(default_factory=list)
    """Of the choices that the engine ended."""
    _started_s: float = field(default_factory=time.monotonic)

    def begin(self, reply_id: str, params: SamplingParams, usage: Usage) -> None:
        """The request is valid and goes to the engine; `usage` is counted on."""
        self.reply_id, self.params, self.usage = reply_id, params, usage

    def hear(self, choice: int, output: TokenOutput) -> None:
        """The engine gave out something."""
        if output.token_ids and self.first_token_s is None:
            self.first_token_s = self.age_s()
        if output.stats is not None:
            self.stats.append(output.stats)
        if output.finish_reason is not None:
            self.end_choice(choice, output.finish_reason)

    def end_choice(self, choice: int, reason: FinishReason) -> None:
        """A choice has ended; also where the engine does not know, because of a stop string."""
        self.finish_reasons[choice] = reason

    def age_s(self) -> float:
        return time.monotonic() - self._started_s


_current: ContextVar[RequestRecord | None] = ContextVar("momaserve_request", default=None)


def current_record() -> RequestRecord:
    """The record of the request that this task serves; a fresh one that nobody reads if none."""
    return _current.get() or RequestRecord()


def current_request_id() -> str | None:
    """Id of the request that this task serves, if it serves one."""
    record = _current.get()
    return None if record is None else record.request_id


class RecordMiddleware:
    """Keeps a record of each request and tells `listeners` at its end, however it ends.

    Stands outside of all other middleware, so that what these answer counts too.
    """

    def __init__(
        self, app: ASGIApp, listeners: Sequence[Callable[[RequestRecord], None]] = ()
    ) -> None:
        self._app = app
        self._listeners = tuple(listeners)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _record_of(scope)
        is_whole = False

        async def watched(message: Message) -> None:
            nonlocal is_whole
            if message["type"] == "http.response.start":
                record.status = message["status"]
            elif message["type"] == "http.response.body":
                is_whole = not message.get("more_body", False)
            await send(message)

        token = _current.set(record)
        try:
            await self._app(scope, receive, watched)
        except asyncio.CancelledError:  # the server closes what is left of its connections
            record.status = CLIENT_CLOSED_REQUEST
            raise
        except Exception:
            record.status = 500
            raise
        finally:
            if not is_whole and (record.status is None or record.status < 400):
                record.status = CLIENT_CLOSED_REQUEST
            record.duration_s = record.age_s()
            for listener in self._listeners:
                listener(record)
            _current.reset(token)


def _record_of(scope: Scope) -> RequestRecord:
    headers = Headers(scope=scope)
    client = scope.get("client")
    return RequestRecord(
        method=scope["method"],
        path=quote(scope["path"])[:MAX_PATH_CHARS],
        client=None if client is None else client[0],
        trace_headers={name: headers[name] for name in TRACE_HEADERS if name in headers},
    )
