"""Pure ASGI middleware (nothing that buffers a stream), and the order in which it stands."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from momaserve.errors import RequestError
from momaserve_server.access_log import AccessLog
from momaserve_server.auth import AuthMiddleware
from momaserve_server.errors import BodyTooLargeError, wire_error
from momaserve_server.request_record import RecordMiddleware, RequestRecord, current_record
from momaserve_server.settings import ServerSettings

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
MAX_REQUEST_ID_CHARS = 128
_REQUEST_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{MAX_REQUEST_ID_CHARS}}}")


def add_middleware(
    app: FastAPI,
    settings: ServerSettings,
    listeners: Sequence[Callable[[RequestRecord], None]] = (),
) -> None:
    """Puts `app` behind all middleware that `settings` ask for.

    Args:
        listeners: are told of each request at its end.
    """
    # From the inside out: what is added last hears of a request first.
    app.add_middleware(UnexpectedErrorMiddleware)
    app.add_middleware(BodyLimitMiddleware, max_body_bytes=settings.max_body_bytes)
    if settings.api_keys:
        app.add_middleware(AuthMiddleware, api_keys=settings.api_keys)
    app.add_middleware(RequestIdMiddleware)
    if settings.cors_origins:
        # Outside of auth: a browser sends no key with the question whether it may ask at all.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),  # OpenAI's clients send some of their own
            expose_headers=(REQUEST_ID_HEADER, "retry-after"),
        )
    access_log = [AccessLog(settings.root_path)] if settings.access_log else []
    app.add_middleware(RecordMiddleware, listeners=(*access_log, *listeners))
    if settings.root_path:
        app.add_middleware(RootPathMiddleware, root_path=settings.root_path)


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
    """Gives each request an id: in `scope["state"]["request_id"]` and as `x-request-id`.

    The client may choose it with the same header; one that is not 1 to 128 characters of
    A-Z a-z 0-9 . _ : - is refused with a 400. Whether it is in use is the engine's to say.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        chosen = Headers(scope=scope).getlist(REQUEST_ID_HEADER)
        is_valid = len(chosen) == 1 and _REQUEST_ID.fullmatch(chosen[0]) is not None
        request_id = chosen[0] if is_valid else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        current_record().request_id = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        if chosen and not is_valid:
            error = RequestError(
                f"X-Request-Id must be 1 to {MAX_REQUEST_ID_CHARS} characters of "
                f"A-Z a-z 0-9 . _ : -, got {_fault(chosen)}",
                param="request_id",
            )
            await wire_error(error).response()(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)


def _fault(chosen: Sequence[str]) -> str:
    """What is wrong with a client's request id; never long."""
    if len(chosen) > 1:
        return f"{len(chosen)} of them"
    if not 1 <= len(chosen[0]) <= MAX_REQUEST_ID_CHARS:
        return f"{len(chosen[0])} characters"
    return repr(next(char for char in chosen[0] if not _REQUEST_ID.fullmatch(char)))


class UnexpectedErrorMiddleware:
    """Logs what nobody caught, once and with its request's id, and answers it with a 500.

    Stands inside of the others, so that the answer has all their headers; the framework's own
    last resort stands outside of them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if has_begun:  # all that is left is to break the connection
                raise
            logger.exception("unexpected error")
            await wire_error(error).response()(scope, receive, send)


class RootPathMiddleware:
    """Tells the app of the prefix under which a proxy shows it.

    The proxy may take the prefix off or leave it: inside, `path` is always with it, as ASGI has
    it, and `root_path` says what to take off.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            root, path = self._root_path, scope["path"]
            is_there = path == root or path.startswith(root + "/")
            scope = {**scope, "root_path": root, "path": path if is_there else root + path}
        await self._app(scope, receive, send)
