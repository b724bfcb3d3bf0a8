"""Server-sent events out of bytes that arrive in pieces of any size."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

from momaserve_client.errors import BadReplyError

MAX_EVENT_CHARS = 1 << 26
"""More than any picture needs; what grows beyond it is no stream of events."""
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    data: str
    event: str = "message"


class SSEDecoder:
    """Owns the part of an event that has not arrived whole. A piece may end anywhere.

    Follows the HTML standard's "event stream interpretation": bad UTF-8 is replaced, comments
    and unknown fields are skipped, an event that the stream's end cuts off is dropped.
    """

    def __init__(self, max_event_chars: int = MAX_EVENT_CHARS) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._max_chars = max_event_chars
        self._line: list[str] = []  # the line at hand, in as many parts as it came
        self._num_chars = 0  # of the event at hand
        self._is_first = True
        self._ended_with_cr = False
        self._data: list[str] = []
        self._event = ""

    def feed(self, piece: bytes) -> list[ServerEvent]:
        """The events that `piece` completes. Raises BadReplyError when one grows too long."""
        text = self._utf8.decode(piece)
        if text and self._is_first:
            self._is_first = False
            text = text.removeprefix(BYTE_ORDER_MARK)
        if text and self._ended_with_cr:
            self._ended_with_cr = False
            text = text.removeprefix("\n")  # the second half of a line break
        if not text:
            return []
        self._ended_with_cr = text.endswith("\r")
        *ends, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        events: list[ServerEvent] = []
        for end in ends:
            self._hold(end)
            line = "".join(self._line)
            self._line.clear()
            event = self._take(line)
            if event is not None:
                events.append(event)
        if rest:
            self._hold(rest)
        return events

    def _hold(self, text: str) -> None:
        self._line.append(text)
        self._num_chars += len(text)
        if self._num_chars > self._max_chars:
            raise BadReplyError(f"an event is longer than {self._max_chars} characters")

    def _take(self, line: str) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        else:  # comments and other fields mean nothing here
            self._num_chars -= len(line)
        return None

    def _dispatch(self) -> ServerEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._num_chars = [], "", 0
        return ServerEvent("\n".join(data), event or "message") if data else None
