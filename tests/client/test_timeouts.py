"""Time limits on real sockets, and the connections that are cut, kept and closed with them."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import count

import pytest

from momaserve_client import (
    BadReplyError,
    ClientTimeoutError,
    ConnectionFailedError,
    NotConnectedError,
    Retries,
    ServerError,
    TextChunk,
    Timeouts,
)
from momaserve_client.timeouts import Deadline, PhaseLimits
from tests.client.both import DONE, Clock, Script, answer, events, refusal, text_chunk
from tests.client.conftest import Connect
from tests.client.raw_server import (
    EVENT_STREAM,
    GUARD_S,
    JSON,
    LAST_CHUNK,
    Connection,
    chunked,
    raw_server,
)

SHORT_S = 0.05
OK = JSON + chunked(b'{"data": []}') + LAST_CHUNK


@pytest.mark.parametrize("name", ["connect_s", "read_s", "total_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_limits_are_above_zero(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Timeouts(**{name: value})


def test_phases_share_the_total() -> None:
    clock = Clock()
    deadline = Deadline(Timeouts(connect_s=10, read_s=600, total_s=15), clock.monotonic)
    limits = PhaseLimits(deadline)
    assert dict(limits) == {"connect": 10, "read": 15, "write": 15, "pool": 15}
    clock.now += 9
    assert dict(limits) == {"connect": 6, "read": 6, "write": 6, "pool": 6}
    clock.now += 9
    assert dict(limits) == dict.fromkeys(limits, 0.001)  # 0 would be "never wait"
    free = PhaseLimits(Deadline(Timeouts(read_s=None), clock.monotonic))
    assert dict(free) == {"connect": 10.0, "read": None, "write": None, "pool": None}


def test_the_transport_is_given_what_is_left(connect: Connect) -> None:
    clock = Clock()
    script = Script(refusal(429, None, retry_after="4"), answer(payload={"data": []}))
    connect(transport=script.transport, clock=clock).models(timeouts=Timeouts(total_s=10))
    reads = [request.extensions["timeout"]["read"] for request in script.seen]
    assert reads == [6, 6]  # looked up now, after the wait of 4 s
    assert clock.sleeps == [4.0]


def stalling(*sent: bytes) -> Callable[[Connection], None]:
    """Answers so much and then nothing; ends when the client has enough, maybe before it asked."""

    def script(connection: Connection) -> None:
        with suppress(ConnectionError):
            connection.request()
            connection.send(*sent)
            connection.until_closed()

    return script


def dripping(head: bytes, piece: bytes) -> Callable[[Connection], None]:
    """Never silent, never done."""

    def script(connection: Connection) -> None:
        with suppress(ConnectionError):
            connection.request()
            connection.send(head)
            for _ in count():
                connection.send(piece)

    return script


SILENT = [
    stalling(),
    stalling(b"HTTP/1.1 200 OK\r\n"),
    stalling(JSON, chunked(b'{"data": ')),
    stalling(b"HTTP/1.0 200 OK\r\n\r\n", b'{"data": '),  # ends when the connection does
]
BUSY = [dripping(JSON, chunked(b" ")), dripping(b"HTTP/1.0 200 OK\r\n\r\n", b" ")]
BAD_PAGE = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 9999999\r\n\r\n"


@pytest.mark.parametrize("script", SILENT)
def test_read(connect: Connect, script: Callable[[Connection], None]) -> None:
    with raw_server(script) as server:
        client = connect(server.url, timeouts=Timeouts(read_s=SHORT_S))
        with pytest.raises(ClientTimeoutError, match="silent for read_s = 0.05 s") as caught:
            client.models()
    assert caught.value.request_id


@pytest.mark.parametrize("script", [*SILENT, *BUSY])
def test_total(connect: Connect, script: Callable[[Connection], None]) -> None:
    """Also where pieces keep coming, which a limit per read does not notice."""
    with raw_server(script) as server:
        client = connect(server.url, timeouts=Timeouts(total_s=SHORT_S))
        with pytest.raises(ClientTimeoutError, match="total_s = 0.05 s passed"):
            client.models()


@pytest.mark.parametrize("script", BUSY)
def test_total_ends_a_read_whatever_the_injected_clock_says(
    connect: Connect, script: Callable[[Connection], None]
) -> None:
    with raw_server(script) as server:
        client = connect(server.url, timeouts=Timeouts(total_s=SHORT_S), clock=Clock())
        with pytest.raises(ClientTimeoutError, match="total_s = 0.05 s passed"):
            client.models()


# Long enough for the status to come first on a busy machine.
@pytest.mark.parametrize("limits", [Timeouts(read_s=1), Timeouts(total_s=1)])
def test_an_error_page_that_stalls(connect: Connect, limits: Timeouts) -> None:
    """Its status says enough."""
    has_answered = threading.Event()

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(BAD_PAGE, b"half")
        has_answered.set()
        connection.until_closed()

    clock = Clock()  # stands still, so that the time cannot be over before the status came
    with raw_server(script) as server, pytest.raises(ServerError, match="status 502"):
        connect(server.url, clock=clock, timeouts=limits).models()
    assert has_answered.is_set()


@pytest.mark.parametrize(
    "script",
    [
        stalling(EVENT_STREAM, chunked(text_chunk("a"))),
        dripping(EVENT_STREAM + chunked(text_chunk("a")), chunked(b": still here\n\n")),
    ],
)
def test_total_of_a_stream(connect: Connect, script: Callable[[Connection], None]) -> None:
    with raw_server(script) as server:
        stream = connect(server.url).stream_chat("hi", timeouts=Timeouts(total_s=SHORT_S))
        with pytest.raises(ClientTimeoutError, match="total_s"):
            list(stream)


def test_total_counts_the_readers_own_time(connect: Connect) -> None:
    clock = Clock()
    script = Script(events(text_chunk("a"), text_chunk("b"), DONE))
    client = connect(transport=script.transport, clock=clock)
    stream = client.stream_chat("hi", timeouts=Timeouts(total_s=5))
    assert next(stream) == TextChunk(text="a")
    clock.now += 6
    with pytest.raises(ClientTimeoutError, match="total_s = 5 s passed"):
        next(stream)


def test_an_answer_in_time_is_no_timeout(connect: Connect) -> None:
    def script(connection: Connection) -> None:
        for _ in range(2):  # the timer of the first call must leave the second alone
            connection.request()
            connection.send(OK)
        connection.until_closed()

    with raw_server(script) as server:
        client = connect(server.url, timeouts=Timeouts(total_s=60))
        assert client.models() == []
        assert client.models() == []
        client.close()


def reset(connection: Connection) -> None:
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 20", JSON, JSON + chunked(b'{"da')])
def test_a_server_that_dies(connect: Connect, sent: bytes, is_reset: bool) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(sent)
        if is_reset:
            reset(connection)

    with raw_server(script) as server, pytest.raises(ConnectionFailedError) as caught:
        connect(server.url).models()
    assert not isinstance(caught.value, NotConnectedError)


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_server_that_dies_in_mid_stream(connect: Connect, is_reset: bool) -> None:
    has_read = threading.Event()

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(EVENT_STREAM, chunked(text_chunk("a")), b"1f\r\ndata: {")
        assert has_read.wait(GUARD_S)
        if is_reset:
            reset(connection)

    with raw_server(script) as server, connect(server.url).stream_chat("hi") as stream:
        assert next(stream) == TextChunk(text="a")
        has_read.set()
        with pytest.raises(ConnectionFailedError, match="before the answer was whole"):
            next(stream)


def test_what_is_no_http(connect: Connect) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"SSH-2.0-OpenSSH_9.2\r\n")

    with raw_server(script) as server, pytest.raises(ConnectionFailedError):
        connect(server.url).models()


def test_nobody_listens(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    clock = Clock()
    client = connect(f"http://127.0.0.1:{port}", clock=clock, retries=Retries(max_retries=1))
    with pytest.raises(NotConnectedError, match="^Connection refused$"):
        client.models()
    assert len(clock.sleeps) == 1


def test_closing_a_stream_closes_the_socket(connect: Connect) -> None:
    script = stalling(EVENT_STREAM, chunked(text_chunk("a")))  # ends when the socket is closed
    with raw_server(script) as server, connect(server.url).stream_chat("hi") as stream:
        assert next(stream) == TextChunk(text="a")


def test_a_connection_is_used_again_after_a_whole_stream(connect: Connect) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(EVENT_STREAM, chunked(text_chunk("a")), chunked(DONE), LAST_CHUNK)
        connection.request()
        connection.send(OK)
        connection.until_closed()

    with raw_server(script) as server:
        client = connect(server.url)
        assert list(client.stream_chat("hi")) == [TextChunk(text="a")]
        assert client.models() == []
        client.close()


def test_a_body_without_end(connect: Connect) -> None:
    """An old proxy closes the connection instead of telling the length."""

    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n", b'{"da')

    with raw_server(script) as server, pytest.raises(BadReplyError):
        connect(server.url).models()
