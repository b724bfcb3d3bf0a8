"""The client's SSE decoder against every way of cutting and ending lines."""

from __future__ import annotations

import pytest

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
