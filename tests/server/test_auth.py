"""Who may use the API: keys on every route, browsers of other origins, a proxy's prefix."""

from __future__ import annotations

import hmac
import http.client
import logging
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from momaserve.errors import ConfigError
from momaserve_server.auth import AuthMiddleware
from momaserve_server.settings import ServerSettings
from tests.server.asgi import TIMEOUT_S, Call, chat_body, client_of, http as client_with, make_app
from tests.server.fake_engine import FakeAsyncEngine
from tests.server.live import live

pytestmark = pytest.mark.anyio

KEYS = ("sk-first", "sk-second")
OPEN = {"/", "/health", "/ready", "/playground/{name}"}
RIGHT = {"Authorization": "Bearer sk-second"}
CHAT = "/v1/chat/completions"


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """(method, path) of everything that the app routes, as its own table has it."""
    found = []
    for context in iter_route_contexts(app.routes):
        path, methods = context.path, context.methods
        assert path is not None
        found += [(method, path) for method in sorted(methods or {"GET"})]
    return found
