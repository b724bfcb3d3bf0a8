"""`momaserve serve`: loads the checkpoint, listens, and drains when told to stop."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import time
import warnings
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from momaserve.async_engine import AsyncEngine
from momaserve.engine import Engine
from momaserve.errors import ConfigError, MomaserveError, SamplingError
from momaserve.warm_up import warm_up
from momaserve_server.app import create_app
from momaserve_server.cli import BAD_USAGE, FAILED
from momaserve_server.cli_options import engine_config, model_source, server_settings
from momaserve_server.logs import configure_logging
from momaserve_server.metrics import ServerMetrics
from momaserve_server.settings import ServerSettings
from momaserve_server.shadow_tap import shadow_eval_of

if TYPE_CHECKING:
    from momaserve_server.tracing import RequestTracer

logger = logging.getLogger(__name__)

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
        logger.info("%s: finishing running requests (up to %g s)", name, self._drain_timeout_s)
        self._drain = asyncio.ensure_future(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        try:
            await self._async_engine.drain(self._drain_timeout_s)
        finally:
            self.should_exit = True


def run(args: argparse.Namespace) -> int:
    """Serves until a signal; returns the exit code.

    Raises:
        MomaserveError: the server cannot start; with JSON logs it is a line of them instead.
    """
    settings = server_settings(args)
    configure_logging(settings.log_format, settings.log_level)
    try:
        return _run(args, settings)
    except Exception as error:
        if settings.log_format != "json":
            raise  # the command line tells it
        is_expected = isinstance(error, MomaserveError)
        logger.critical(
            "%s", error if is_expected else "unexpected error", exc_info=not is_expected
        )
        return BAD_USAGE if isinstance(error, ConfigError | SamplingError) else FAILED


def _run(args: argparse.Namespace, settings: ServerSettings) -> int:
    started = time.monotonic()
    # A stranger's picture must not write to our stderr, nor grow Python's registry of warnings.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    config = engine_config(args)
    if settings.shadow_eval:  # it computes with the model itself, whatever the engine packs
        config = replace(config, keep_weights=True)
    checkpoint = model_source(args)
    if settings.otlp_traces_endpoint is not None:
        _tracing()  # what is missing is told of at once
    with bound_socket(settings) as listening:
        host, port = listening.getsockname()[:2]
        logger.info("loading %s", checkpoint)
        with _ended_by_sigterm():
            engine = Engine.load(checkpoint, config)
            if settings.warm_up:
                done = warm_up(engine)
                sizes = ", ".join(map(str, done.batch_sizes))
                logger.info("warmed up in %.2f s, in batches of %s", done.seconds, sizes)
        name = settings.served_model_name or engine.model_name
        metrics = ServerMetrics(settings.metrics_prefix, model_name=name)
        async_engine = AsyncEngine(engine, listener=metrics)
        shadow_eval = shadow_eval_of(settings, async_engine)
        tracer = _tracer(settings, name)
        listeners = () if tracer is None else (tracer,)
        app = create_app(
            async_engine, settings, metrics=metrics, listeners=listeners, shadow_eval=shadow_eval
        )
        server = DrainingServer(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            ),
            async_engine,
            settings.drain_timeout_s,
        )
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        announce = _announce(server, async_engine, f"{name} at {address}", started)
        try:
            with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                runner.run(_serve(server, listening, announce))
        finally:
            if tracer is not None:
                tracer.close()
    return 0 if server.started else FAILED


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM end the process also where it is PID 1, which has no default for signals."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tracing() -> Any:
    """`momaserve_server.tracing`, whose packages are optional.

    Raises:
        ConfigError: they are not installed.
    """
    try:
        return import_module("momaserve_server.tracing")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"otlp_traces_endpoint needs the package {error.name!r}: pip install 'momaserve[otel]'"
        ) from None


def _tracer(settings: ServerSettings, model_name: str) -> RequestTracer | None:
    if settings.otlp_traces_endpoint is None:
        return None
    tracer: RequestTracer = _tracing().otlp_tracer(settings.otlp_traces_endpoint, model_name)
    return tracer


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
    logger.info("ready after %.1f s: %s (Ctrl-C stops)", time.monotonic() - started, what)


def bound_socket(settings: ServerSettings) -> socket.socket:
    """Bound before the checkpoint is loaded, so that a taken port is told of at once.

    It does not listen yet: who comes too early is refused, not kept waiting.
    """
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        # asyncio turns Nagle's algorithm off only where the socket says that it is TCP; with it on,
        # all but the first reply of a connection wait 40 ms for the client's acknowledgement.
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ListenError(f"cannot listen on {host} port {port}: {reason}") from None
    return bound
