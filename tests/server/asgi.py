"""Builds the app over a fake engine, and talks to it with or without httpx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.types import Message

from momaserve_server.app import create_app
from momaserve_server.metrics import ServerMetrics
from momaserve_server.request_record import RequestRecord
from momaserve_server.settings import ServerSettings
from tests.server.fake_engine import FakeAsyncEngine

USER = {"role": "user", "content": "hi"}
TIMEOUT_S = 10.0
"""Nothing here waits for time to pass; a test that gets here hangs."""


def make_app(
    fake: FakeAsyncEngine | None = None,
    metrics: ServerMetrics | None = None,
    listeners: Sequence[Callable[[RequestRecord], None]] = (),
    **settings: Any,
) -> FastAPI:
    return create_app(
        (fake or FakeAsyncEngine()).as_engine(),
        ServerSettings(**settings),
        metrics=metrics or ServerMetrics(),
        listeners=listeners,
    )


@asynccontextmanager
async def http(
    fake: FakeAsyncEngine | None = None, **settings: Any
) -> AsyncGenerator[httpx.AsyncClient, None]:
    async with client_of(make_app(fake, **settings)) as client:
        yield client


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], **fields}


def data_of(text: str) -> list[Any]:
    """The JSON of every `data:` line of a stream, "[DONE]" as it stands."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def joined(pieces: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(pieces))


class Call:
    """One request, driven message by message, whose client can hang up at any time."""

    def __init__(
        self,
        app: FastAPI,
        path: str,
        body: Any = None,
        *,
        pieces: Sequence[bytes] | None = None,
        headers: Sequence[tuple[bytes, bytes]] = ((b"content-type", b"application/json"),),
    ) -> None:
        sent = [json.dumps(body).encode()] if pieces is None else list(pieces)
        self.num_received = 0
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        for at, piece in enumerate(sent):
            more = at + 1 < len(sent)
            self._incoming.put_nowait({"type": "http.request", "body": piece, "more_body": more})
        self._outgoing: asyncio.Queue[Message] = asyncio.Queue()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "headers": list(headers),
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._outgoing.put))

    async def _receive(self) -> Message:
        self.num_received += 1
        return await self._incoming.get()

    async def message(self) -> Message:
        """The next message of the answer."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self._outgoing.get()

    async def start(self) -> int:
        """Status of the answer."""
        message = await self.message()
        assert message["type"] == "http.response.start"
        status: int = message["status"]
        return status

    async def body(self) -> bytes:
        body: bytes = (await self.message()).get("body", b"")
        return body

    async def rest(self) -> bytes:
        """All of the body that is still to come."""
        pieces = []
        while True:
            message = await self.message()
            pieces.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(pieces)

    def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def ended(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self.task
