"""A real server on the embedded demo, started once and stopped by SIGTERM at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

READY_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class LiveServer:
    """A `momaserve serve` process."""

    url: str
    process: subprocess.Popen[str]

    def card(self) -> dict[str, Any]:
        """What the server says of its model."""
        found: dict[str, Any] = httpx.get(f"{self.url}/v1/models").json()["data"][0]
        return found

    @property
    def tokens_per_image(self) -> int:
        count: int = self.card()["image"]["tokens_per_image"]
        return count


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_server(*arguments: str) -> LiveServer:
    """Start a server and wait until it says that it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "momaserve_server", "serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    seen: list[str] = []
    for line in process.stderr:  # ends when the process does
        seen.append(line)
        if "ready" in line:
            break
    else:
        raise AssertionError("the server ended before it was ready:\n" + "".join(seen))
    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/ready", timeout=READY_TIMEOUT_S).status_code == 200
    return LiveServer(url, process)


def stop_server(server: LiveServer) -> int:
    """SIGTERM, then the exit code."""
    server.process.send_signal(signal.SIGTERM)
    _, _ = server.process.communicate(timeout=READY_TIMEOUT_S)
    return server.process.returncode


@pytest.fixture(scope="session")
def server() -> Iterator[LiveServer]:
    live = start_server()
    yield live
    assert stop_server(live) == 0
