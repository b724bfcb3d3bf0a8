"""`momaserve serve`: loads the checkpoint, listens, and drains when told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
import time
import warnings
from collections.abc import Coroutine
from types import FrameType
from typing import Any

import uvicorn

from momaserve.async_engine import AsyncEngine
from momaserve.engine import Engine
from momaserve.errors import MomaserveError
from momaserve_server.app import create_app
from momaserve_server.cli_options import engine_config, model_source, server_settings
from momaserve_server.metrics import ServerMetrics
from momaserve_server.settings import ServerSettings

CLOSE_TIMEOUT_S = 5
"""For sending what finished requests still have in the socket's buffer."""
READY_POLL_S = 0.02


class ListenError(MomaserveError):
    """The address cannot be listened on."""


class DrainingServer(uvicorn.Server):
    """Uvicorn, except that the first SIGTERM or SIGINT drains before it closes the socket.

    While draining, connections are still answered (new requests with a 503, running ones with
    what they asked for). A second signal ends at once.
    """

    def __init__(
        self, config: uvicorn.Config, async_engine: AsyncEngine, drain_timeout_s: float
    ) -> None:
        super().__init__(config)
        self._async_engine = async_engine
        self._drain_timeout_s = drain_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._num_signals = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._num_signals > 1 or self._loop is None or not self.started:
            self.should_exit = self.force_exit = True
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # no cancelled stacks
            return
        self._loop.call_soon_threadsafe(self._begin_drain, signal.Signals(sig).name)

    def _begin_drain(self, name: str) -> None:
        _say(f"{name}: finishing running requests (up to {self._drain_timeout_s:g} s)")
        self._drain = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        try:
            await self._async_engine.drain(self._drain_timeout_s)
        finally:
            self.should_exit = True


def run(args: argparse.Namespace) -> int:
    """Serves until a signal; returns the exit code."""
    started = time.monotonic()
    # A stranger's picture must not write to our stderr, nor grow Python's registry of warnings.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    settings = server_settings(args)
    config = engine_config(args)
    checkpoint = model_source(args)
    with bound_socket(settings) as listening:
        host, port = listening.getsockname()[:2]
        _say(f"loading {checkpoint}")
        metrics = ServerMetrics()
        async_engine = AsyncEngine(Engine.load(checkpoint, config), listener=metrics)
        app = create_app(async_engine, settings, metrics=metrics)
        server = DrainingServer(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            ),
            async_engine,
            settings.drain_timeout_s,
        )
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        name = settings.served_model_name or async_engine.engine.model_name
        announce = _announce(server, async_engine, f"{name} at {address}", started)
        asyncio.run(_serve(server, listening, announce))
    return 0 if server.started else 1


async def _serve(
    server: DrainingServer, listening: socket.socket, announce: Coroutine[Any, Any, None]
) -> None:
    announcing = asyncio.ensure_future(announce)
    try:
        await server.serve(sockets=[listening])
    finally:
        announcing.cancel()


async def _announce(
    server: DrainingServer, async_engine: AsyncEngine, what: str, started: float
) -> None:
    while not (server.started and async_engine.is_ready):
        await asyncio.sleep(READY_POLL_S)
    _say(f"ready after {time.monotonic() - started:.1f} s: {what} (Ctrl-C stops)")


def bound_socket(settings: ServerSettings) -> socket.socket:
    """Bound before the checkpoint is loaded, so that a taken port is told of at once.

    It does not listen yet: who comes too early is refused, not kept waiting.
    """
    host, port = settings.host, settings.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ListenError(f"cannot listen on {host} port {port}: {reason}") from None
    return bound


def _say(line: str) -> None:
    print(f"momaserve: {line}", file=sys.stderr, flush=True)
