"""Server-sent events out of bytes that arrive in pieces of any size."""

from __future__ import annotations

import codecs
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerEvent:
    data: str
    event: str = "message"


class SSEDecoder:
    """Owns the part of an event that has not arrived whole. A piece may end anywhere."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._ended_with_cr = False
        self._data: list[str] = []
        self._event = ""

    def feed(self, piece: bytes) -> list[ServerEvent]:
        """The events that `piece` completes."""
        text = self._utf8.decode(piece)
        if text and self._ended_with_cr:
            self._ended_with_cr = False
            text = text.removeprefix("\n")  # the second half of a line break
        if not text:
            return []
        self._ended_with_cr = text.endswith("\r")
        text = self._line + text.replace("\r\n", "\n").replace("\r", "\n")
        *lines, self._line = text.split("\n")
        events = [self._take(line) for line in lines]
        return [event for event in events if event is not None]

    def _take(self, line: str) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        return None  # comments and other fields mean nothing here

    def _dispatch(self) -> ServerEvent | None:
        data, event = self._data, self._event
        self._data, self._event = [], ""
        return ServerEvent("\n".join(data), event or "message") if data else None
