"""Pure ASGI middleware (nothing that buffers a stream): body limit and request ids."""

from __future__ import annotations

import uuid
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from momaserve_server.errors import BodyTooLargeError


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


class BodyLimitMiddleware:
    """Raises BodyTooLargeError out of `receive` as soon as a body is known to be too long.

    A chunked body is counted while it is read. What is too long is read on and thrown away, up
    to as much again, because most clients see a connection that is closed under their hands
    rather than the answer; a declared length far beyond the limit is refused unread. The error
    surfaces in the route that reads the body and becomes a 413 there.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._limit = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = _declared_length(scope)
        num_bytes = 0

        async def discard() -> None:
            nonlocal num_bytes
            while num_bytes <= 2 * self._limit:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return

        async def limited() -> Message:
            nonlocal num_bytes
            if declared > self._limit:
                if declared <= 2 * self._limit:
                    await discard()
                raise BodyTooLargeError(
                    f"the request body has {declared} bytes; the limit is {self._limit}"
                )
            message: MutableMapping[str, Any] = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._limit:
                    if message.get("more_body"):
                        await discard()
                    raise BodyTooLargeError(
                        f"the request body is longer than the limit of {self._limit} bytes"
                    )
            return message

        await self._app(scope, limited, send)


class RequestIdMiddleware:
    """Gives each request an id: in `scope["state"]["request_id"]` and as `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)
