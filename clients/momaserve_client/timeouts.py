"""How long a call may take, and what keeps it to that."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from momaserve_client.errors import ClientTimeoutError

SHORTEST_S = 0.001
"""0 would mean "do not block" to a socket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Limits in seconds; None is no limit. What passes one raises ClientTimeoutError."""

    connect_s: float | None = 10.0
    """For one attempt to connect."""
    read_s: float | None = 600.0
    """Between two pieces of an answer, and before the first: waiting in the queue counts."""
    total_s: float | None = None
    """For the whole call: retries, the waits between them, and reading a stream to its end."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not value > 0:
                raise ValueError(f"{item.name} must be above 0 or None, got {value!r}")


class Deadline:
    """The clock of one call. Starts when it is made."""

    def __init__(self, timeouts: Timeouts, monotonic: Callable[[], float]) -> None:
        self.timeouts = timeouts
        self._monotonic = monotonic
        self._end = None if timeouts.total_s is None else monotonic() + timeouts.total_s

    def remaining_s(self) -> float | None:
        """At least 0; None without a limit."""
        return None if self._end is None else max(0.0, self._end - self._monotonic())

    def has_room_for(self, delay_s: float) -> bool:
        remaining = self.remaining_s()
        return remaining is None or delay_s < remaining

    def expire(self) -> None:
        """Somebody else's clock says that the time is over."""
        self._end = -math.inf

    def error(self) -> ClientTimeoutError | None:
        """What to raise if the time is over."""
        remaining = self.remaining_s()
        if remaining is None or remaining > SHORTEST_S:
            return None
        return ClientTimeoutError(f"total_s = {self.timeouts.total_s} s passed")

    def check(self) -> None:
        """Raises ClientTimeoutError if the time is over."""
        error = self.error()
        if error is not None:
            raise error


class PhaseLimits(Mapping[str, float | None]):
    """httpx's `timeout` extension, except that each value is what is left when it is read.

    The transport looks a limit up at the beginning of each phase, so that connecting, sending
    and waiting cannot add up to more than `total_s`.
    """

    def __init__(self, deadline: Deadline) -> None:
        limits = deadline.timeouts
        self._deadline = deadline
        self._limits = {
            "connect": limits.connect_s,
            "read": limits.read_s,
            "write": limits.read_s,
            "pool": None,
        }

    def __getitem__(self, phase: str) -> float | None:
        both = (self._limits[phase], self._deadline.remaining_s())
        limits = [limit for limit in both if limit is not None]
        return max(SHORTEST_S, min(limits)) if limits else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._limits)

    def __len__(self) -> int:
        return len(self._limits)


class Watchdog:
    """Cuts the connection of an answer when its deadline passes, in the middle of a read too.

    A limit per read cannot do that: pieces that keep coming would start it anew. Owns a timer's
    thread between `__enter__` and `__exit__`, if there is a limit.
    """

    def __init__(self, deadline: Deadline, network_stream: Any) -> None:
        """
        Args:
            network_stream: the extension of that name of httpx's response; None does nothing.
        """
        remaining = deadline.remaining_s()
        connection = network_stream and network_stream.get_extra_info("socket")
        self._deadline = deadline
        self._lock = threading.Lock()
        self._connection: socket.socket | None = connection
        self._timer: threading.Timer | None = None
        if remaining is not None and connection is not None:
            self._timer = threading.Timer(remaining, self._cut)
            self._timer.daemon = True

    def __enter__(self) -> None:
        if self._timer is not None:
            self._timer.start()

    def __exit__(self, *exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:  # from here on the connection may serve another call
            self._connection = None

    def _cut(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._deadline.expire()
                with suppress(OSError):  # it may be closed already
                    socket.socket.shutdown(self._connection, socket.SHUT_RDWR)
