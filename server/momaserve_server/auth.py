"""API keys: who may use the API. Everything is closed that is not on the short list of open paths.

A key is never shown: not in errors, not in logs, not in `repr`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from momaserve_server.errors import InvalidApiKeyError, wire_error

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
OPEN_PREFIX = "/playground/"
"""Load balancers have no key, and the playground's files hold no data: the page asks for one."""

POLICY_VIOLATION = 1008
"""Of a websocket's close frame."""


def route_path(scope: Scope) -> str:
    """The path that routes are looked up by: without the prefix that a proxy may show."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class AuthMiddleware:
    """Answers with a 401 to whoever has no key. Nothing of a body is read before."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        # Digests are of one length, so that a comparison does not tell how long a key is.
        self._digests = [_digest(key.encode("ascii")) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _is_open(scope):
            await self._app(scope, receive, send)
            return
        given = _bearer(scope)
        if given is not None and self._knows(given):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            what = "the API key is wrong" if given is not None else "an API key is needed"
            error = InvalidApiKeyError(f"{what}: send the header 'Authorization: Bearer KEY'")
            await wire_error(error).response()(scope, receive, send)

    def _knows(self, given: bytes) -> bool:
        digest = _digest(given)
        is_known = False
        for known in self._digests:  # all of them, so that time does not tell which one it was
            is_known |= hmac.compare_digest(known, digest)
        return is_known


def _is_open(scope: Scope) -> bool:
    path = route_path(scope)
    return scope["type"] == "http" and (path in OPEN_PATHS or path.startswith(OPEN_PREFIX))


def _bearer(scope: Scope) -> bytes | None:
    """The key that was sent; None without one, or with more than one."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:
        return None
    scheme, _, key = given[0].partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
