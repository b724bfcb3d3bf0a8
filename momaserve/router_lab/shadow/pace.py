"""Scores beside an engine without slowing it: as a rule while it is idle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

DUTY = 0.1
"""Share of the time that scoring may take while the engine has work."""
_LOOK_S = 0.05
"""How often a rest looks whether the engine has become idle."""


class StoppedError(Exception):
    """Scoring is to end, whatever it is at. Never leaves the package."""


class Pace:
    """Called between two pieces of work: rests, or raises StoppedError.

    While the engine has work, each piece is followed by a rest of (1 / DUTY - 1) times as long,
    which ends early when the engine becomes idle. While it is idle there are no rests.
    """

    def __init__(
        self,
        is_busy: Callable[[], bool],
        is_stopping: Callable[[], bool],
        closed: threading.Event,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            is_busy: whether the engine has work.
            is_stopping: whether it takes no new requests any more.
            closed: ends a rest when it is set.
        """
        self._is_busy = is_busy
        self._is_stopping = is_stopping
        self._closed = closed
        self._clock = clock
        self._resumed = clock()

    def begin(self) -> None:
        """A piece of work begins now, and not where the last one ended."""
        self._resumed = self._clock()

    def __call__(self) -> None:
        now = self._clock()
        until = now + (now - self._resumed) * (1 / DUTY - 1)
        while not self._is_over and self._is_busy() and (left := until - self._clock()) > 0:
            self._closed.wait(min(left, _LOOK_S))
        if self._is_over:
            raise StoppedError
        self._resumed = self._clock()

    @property
    def _is_over(self) -> bool:
        return self._closed.is_set() or self._is_stopping()
