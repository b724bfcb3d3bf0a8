"""What is sent again, how often, and after how long: on a clock that the tests own."""

from __future__ import annotations

import httpx
import pytest

from momaserve_client import (
    ClientError,
    ConnectionFailedError,
    DrainingError,
    NotConnectedError,
    QueueFullError,
    RateLimitError,
    Retries,
    ServerError,
    Timeouts,
    UnavailableError,
)
from tests.client.both import (
    DONE,
    Clock,
    Pieces,
    Script,
    answer,
    chat_payload,
    events,
    refusal,
    text_chunk,
)
from tests.client.conftest import Connect


def ok() -> httpx.Response:
    return answer(payload=chat_payload())


def test_a_refused_connection_is_tried_again(connect: Connect) -> None:
    clock, refused = Clock(), httpx.ConnectError("refused")
    script = Script(refused, refused, ok())
    assert connect(transport=script.transport, clock=clock).chat("hi").text == "hi"
    assert clock.sleeps == [0.25, 0.5]  # half of 0.5 and of 1, as the dice say 0
    ids = {request.headers["x-request-id"] for request in script.seen}
    assert len(ids) == 1


def test_the_last_error_is_told(connect: Connect) -> None:
    clock, script = Clock(), Script(httpx.ConnectError("refused"))
    with pytest.raises(NotConnectedError, match="refused"):
        connect(transport=script.transport, clock=clock).chat("hi")
    assert len(script.seen) == 3


@pytest.mark.parametrize(
    ("status", "code"),
    [(429, "queue_full"), (429, "of_a_proxy"), (429, None), (503, "draining"), (503, "not_ready")],
)
def test_refusals_before_any_work(connect: Connect, status: int, code: str | None) -> None:
    clock = Clock()
    script = Script(refusal(status, code, retry_after="7"), refusal(status, code), ok())
    client = connect(transport=script.transport, clock=clock, random=lambda: 0.5)
    assert client.chat("hi").text == "hi"
    assert clock.sleeps == [7.25, 0.75]  # as told and a little more; then 1 s times 3/4


@pytest.mark.parametrize(
    "first",
    [
        refusal(429, "queue_full", retry_after="1", x_should_retry="false"),
        refusal(503, "request_aborted", retry_after="1"),
        refusal(503, "engine_dead"),
        refusal(503, None),
        refusal(500, "internal_error"),
        refusal(408, "timeout"),
        refusal(400, "invalid_value"),
        answer(502, b"<html>"),
        answer(504, b"<html>"),
        answer(200, b"<html>"),
        httpx.ConnectTimeout("slow"),
        httpx.ReadTimeout("slow"),
        httpx.ReadError("gone"),
        httpx.WriteError("gone"),
        httpx.RemoteProtocolError("Server disconnected without sending a response."),
        refusal(429, "queue_full", retry_after="61"),
    ],
)
def test_what_is_not_sent_again(connect: Connect, first: httpx.Response | Exception) -> None:
    clock, script = Clock(), Script(first, ok())
    with pytest.raises(ClientError):
        connect(transport=script.transport, clock=clock).chat("hi")
    assert (len(script.seen), clock.sleeps) == (1, [])


def test_should_retry_true_does_not_make_it_safe(connect: Connect) -> None:
    script = Script(refusal(500, "internal_error", x_should_retry="true"), ok())
    with pytest.raises(ServerError):
        connect(transport=script.transport, clock=Clock()).chat("hi")
    assert len(script.seen) == 1


def test_streams_begin_again_but_never_go_on(connect: Connect) -> None:
    clock = Clock()
    script = Script(
        refusal(503, "not_ready"),
        events(text_chunk("a"), httpx.ReadError("gone")),
        events(text_chunk("a"), text_chunk("b"), DONE),
    )
    stream = connect(transport=script.transport, clock=clock).stream_chat("hi")
    assert next(stream)
    with pytest.raises(ConnectionFailedError, match="gone"):
        next(stream)
    assert len(script.seen) == 2


def test_a_stream_that_dies_before_its_first_byte_is_not_sent_again(connect: Connect) -> None:
    script = Script(events(httpx.ReadError("gone")), events(DONE))
    with pytest.raises(ConnectionFailedError):
        list(connect(transport=script.transport, clock=Clock()).stream_chat("hi"))
    assert len(script.seen) == 1


def test_probes_are_never_sent_again(connect: Connect) -> None:
    clock, script = Clock(), Script(refusal(503, "draining", retry_after="1"))
    assert connect(transport=script.transport, clock=clock).health().reason == "draining"
    assert (len(script.seen), clock.sleeps) == (2, [])
    with pytest.raises(NotConnectedError):
        connect(transport=Script(httpx.ConnectError("no")).transport, clock=clock).health()
    assert clock.sleeps == []


def test_refusals_leave_no_connection_open(connect: Connect) -> None:
    body = Pieces([b"{}"])
    script = Script(httpx.Response(429, stream=body), ok())
    connect(transport=script.transport, clock=Clock()).chat("hi")
    assert body.is_closed


def test_no_retry_that_the_total_has_no_room_for(connect: Connect) -> None:
    clock, script = Clock(), Script(refusal(429, "queue_full", retry_after="7"), ok())
    client = connect(transport=script.transport, clock=clock)
    with pytest.raises(QueueFullError):
        client.chat("hi", timeouts=Timeouts(total_s=7))
    assert clock.sleeps == []
    assert client.chat("hi", timeouts=Timeouts(total_s=8)).text == "hi"


def test_backoff_is_bounded() -> None:
    retries = Retries(max_retries=2000, max_delay_s=3.0)
    error = NotConnectedError("refused")
    delays = [retries.delay_s(error, n, 0.999999) for n in (0, 1, 2, 3, 1999, 2000)]
    assert delays[:5] == pytest.approx([0.5, 1.0, 2.0, 3.0, 3.0], rel=1e-5)
    assert delays[5] is None


def test_none_at_all(connect: Connect) -> None:
    with pytest.raises(ValueError, match="max_retries"):
        Retries(max_retries=-1)
    for first, cls in (
        (httpx.ConnectError("refused"), NotConnectedError),
        (refusal(429, None), RateLimitError),
        (refusal(503, "draining"), DrainingError),
        (refusal(503, "draining_too"), UnavailableError),
    ):
        script = Script(first, ok())
        client = connect(transport=script.transport, clock=Clock(), retries=Retries(max_retries=0))
        with pytest.raises(cls):
            client.chat("hi")
        assert len(script.seen) == 1
