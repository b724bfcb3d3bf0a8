"""A socket that answers HTTP byte by byte as a test says: stalls, breaks off, sends garbage."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

GUARD_S = 10.0
"""Nothing here waits for time to pass; a test that gets here hangs."""

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT_STREAM = HEAD % b"text/event-stream"
JSON = HEAD % b"application/json"
LAST_CHUNK = b"0\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@dataclass
class Connection:
    """One accepted connection, in the hands of a script."""

    socket: socket.socket

    def request(self) -> bytes:
        """Read one request to its end."""
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                while len(body) < int(line.partition(b":")[2]):
                    body += self._more()
        return head + b"\r\n\r\n" + body

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.socket.sendall(piece)

    def until_closed(self) -> None:
        """Wait for the other side to go away; raises TimeoutError if it does not."""
        try:
            while self.socket.recv(4096):
                pass
        except ConnectionError:
            pass

    def _more(self) -> bytes:
        data = self.socket.recv(4096)
        if not data:
            raise ConnectionError("closed in the middle of a request")
        return data


@dataclass
class RawServer:
    url: str
    failures: list[Exception] = field(default_factory=list)


@contextmanager
def raw_server(*scripts: Callable[[Connection], None]) -> Iterator[RawServer]:
    """Each script has one connection, in order. What a script raises fails the test."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(GUARD_S)
        host, port = listening.getsockname()
        server = RawServer(f"http://{host}:{port}")

        def serve() -> None:
            try:
                for script in scripts:
                    accepted, _ = listening.accept()
                    with accepted:
                        accepted.settimeout(GUARD_S)
                        script(Connection(accepted))
            except Exception as error:
                server.failures.append(error)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server
        for _ in scripts:  # one that waits for a client who gave up before connecting gets nobody
            with suppress(OSError):
                socket.create_connection((host, port), GUARD_S).close()
        thread.join(GUARD_S)
        assert not thread.is_alive()
        assert server.failures == [], server.failures
