"""Notices a step that does not come back, and says where it hangs. Knows no engine."""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time

logger = logging.getLogger(__name__)

_LOOKS_PER_LIMIT = 4


class Watchdog:
    """Looks from time to time, from a thread of its own, whether a step is stuck.

    Reports each stuck step once, with the stacks of all threads on standard error.
    """

    def __init__(self, limit_s: float) -> None:
        """
        Args:
            limit_s: a step that runs longer is stuck.
        """
        self._limit_s = limit_s
        self._started: float | None = None
        self._reported: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="momaserve-watchdog", daemon=True)
        self._thread.start()

    def step_starts(self) -> None:
        self._started = time.monotonic()

    def step_ends(self) -> None:
        self._started = None

    @property
    def is_stuck(self) -> bool:
        """Whether a step runs for longer than it may."""
        started = self._started
        return started is not None and time.monotonic() - started >= self._limit_s

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def look(self) -> None:
        """Report a stuck step that was not reported yet."""
        if not self.is_stuck or self._reported == self._started:
            return
        self._reported = self._started
        logger.critical(
            "a step has been running for more than %g s; the stacks of all threads follow on "
            "standard error",
            self._limit_s,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)

    def _watch(self) -> None:
        while not self._closed.wait(self._limit_s / _LOOKS_PER_LIMIT):
            self.look()
