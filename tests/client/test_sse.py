"""The client's SSE decoder against every way of cutting and ending lines."""

from __future__ import annotations

import pytest

from momaserve_client import BadReplyError
from momaserve_client.sse import ServerEvent, SSEDecoder

STREAM = (
    "event: a\ndata: 1ü€😀\n\n: comment\n\ndata: x\ndata:y\nid: 7\nretry: 5\n\ndata\n\ndata:  z\n\n"
)
EVENTS = [
    ServerEvent("1ü€😀", "a"),
    ServerEvent("x\ny"),
    ServerEvent(""),
    ServerEvent(" z"),
]


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_any_cut_and_any_line_break(line_break: str, size: int) -> None:
    raw = STREAM.replace("\n", line_break).encode()
    decoder = SSEDecoder()
    events: list[ServerEvent] = []
    for start in range(0, len(raw), size):
        events += decoder.feed(raw[start : start + size])
    assert events == EVENTS


def test_unfinished_event_is_not_given_out() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"data: x\n") == []
    assert decoder.feed(b"\n") == [ServerEvent("x")]


def test_event_name_does_not_stick() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"event: a\n\ndata: x\n\n") == [ServerEvent("x")]


def test_byte_order_mark() -> None:
    decoder = SSEDecoder()
    assert decoder.feed(b"\xef\xbb") == []
    assert decoder.feed(b"\xbfdata: x\n\n") == [ServerEvent("x")]
    assert decoder.feed(b"\xef\xbb\xbfdata: y\n\n") == []  # only the first is one


def test_only_these_three_end_a_line() -> None:
    text = "a\u2028b\x0bc\x85d"
    assert SSEDecoder().feed(f"data: {text}\n\n".encode()) == [ServerEvent(text)]


def test_bad_utf8_does_not_stop_the_stream() -> None:
    assert SSEDecoder().feed(b"data: a\xff\xc3\n\n") == [ServerEvent("a\ufffd\ufffd")]


def test_an_event_has_a_largest_size() -> None:
    decoder = SSEDecoder(max_event_chars=100)
    for _ in range(50):
        assert decoder.feed(b": a comment of no matter\n") == []
        assert len(decoder.feed(b"data: " + b"x" * 90 + b"\n\n")) == 1
    with pytest.raises(BadReplyError, match="100 characters"):
        for _ in range(50):
            decoder.feed(b"data: x\n")
    with pytest.raises(BadReplyError, match="100 characters"):
        SSEDecoder(max_event_chars=100).feed(b"x" * 101)
