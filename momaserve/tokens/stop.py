"""Finds the stop strings of a request in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Gives text out as soon as no stop string can begin in it any more.

    The first stop string to be complete wins; among those complete at the same character, the
    longest. So the result does not depend on how the text is cut into pieces. Constant work per
    character and stop string (Knuth, Morris and Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._fallbacks = [_fallbacks(stop) for stop in stops]
        self._matched = [0] * len(self._stops)  # characters of each stop string seen last
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; it and all text after it are dropped."""

    def push(self, text: str) -> str:
        """Take the next piece; returns text that is certain not to be part of a stop string."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        for end, char in enumerate(text, start=1):
            longest = self._advance(char)
            if longest:
                self.stopped = True
                given = (self._held + text[:end])[:-longest]
                self._held = ""
                return given
        whole = self._held + text
        cut = len(whole) - max(self._matched)
        self._held = whole[cut:]
        return whole[:cut]

    def finish(self) -> str:
        """The text is over: what was held back belongs to it."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> int:
        """Length of the longest stop string that `char` completes, or 0."""
        longest = 0
        for i, stop in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = self._fallbacks[i][matched - 1]
            if stop[matched] == char:
                matched += 1
            self._matched[i] = matched
            if matched == len(stop):
                longest = max(longest, matched)
        return longest


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`: its longest proper suffix that `stop` starts with."""
    table = [0] * len(stop)
    matched = 0
    for i in range(1, len(stop)):
        while matched and stop[matched] != stop[i]:
            matched = table[matched - 1]
        if stop[matched] == stop[i]:
            matched += 1
        table[i] = matched
    return table
