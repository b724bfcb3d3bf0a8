"""The app on a real socket: uvicorn in a thread, on a port that the system chooses."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from momaserve_server.serving import DrainingServer, bound_socket
from momaserve_server.settings import ServerSettings
from tests.server.asgi import TIMEOUT_S, make_app
from tests.server.fake_engine import FakeAsyncEngine


@dataclass
class Live:
    url: str
    server: DrainingServer
    fake: FakeAsyncEngine
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    def call(self, function: Any, *args: Any) -> None:
        """Runs `function` on the server's event loop."""
        self.loop.call_soon_threadsafe(function, *args)


@contextmanager
def live(
    fake: FakeAsyncEngine | None = None, *, drain_timeout_s: float = TIMEOUT_S, **settings: Any
) -> Generator[Live, None, None]:
    fake = fake or FakeAsyncEngine()
    app = make_app(fake, **settings)
    config = uvicorn.Config(
        app, log_level="error", timeout_graceful_shutdown=1, access_log=False, lifespan="on"
    )
    server = DrainingServer(config, fake.as_engine(), drain_timeout_s)
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        startup = server.startup

        async def startup_and_tell(sockets: Any = None) -> None:
            await startup(sockets)
            started.set()

        server.startup = startup_and_tell  # type: ignore[method-assign]
        await server.serve(sockets=[listening])

    with bound_socket(ServerSettings(port=0)) as listening:
        host, port = listening.getsockname()
        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert started.wait(TIMEOUT_S)
        try:
            yield Live(f"http://{host}:{port}", server, fake, loops[0], thread)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            server.handle_exit(signal.SIGTERM, None)  # twice: at once
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
