"""What shadow evaluation has found so far: counts since the start, and a window of late batches."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from momaserve.modality import Modality
from momaserve.router_lab.selections import kind_of
from momaserve.router_lab.shadow.evaluation import PASSES, Evaluation

WINDOW_TOKENS = 65_536
MISSED, ADDED = "missed", "added"
FLIPS = (MISSED, ADDED)
"""The oracle selects a pair and the policy does not; and the reverse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything at one moment. Counts are since the start, the window is what came last."""

    since: float
    """Unix seconds."""
    num_requests: int
    num_dropped: int
    num_failed: int
    """Batches that could not be scored."""
    tokens: Mapping[str, int]
    """By modality."""
    decisions: Mapping[str, int]
    """By kind of router: (token, expert) pairs of all layers."""
    flips: Mapping[tuple[str, str], int]
    """By kind of router and FLIPS: decisions that the oracle makes otherwise."""
    window_since: float | None
    """Unix seconds at which the oldest batch of the window was scored."""
    window_tokens: int
    confusion: Mapping[str, NDArray[np.int64]]
    """By router: [E, 4] of the window."""
    losses: Mapping[str, NDArray[np.float64]]
    """By PASSES: [4] of the window, see `Evaluation`."""

    def of_kind(self, kind: str) -> NDArray[np.int64]:
        """[4]: the window's counts, all layers and experts of a kind together."""
        mine = [each.sum(0) for site, each in self.confusion.items() if kind_of(site) == kind]
        return np.sum(mine, axis=0) if mine else np.zeros(4, np.int64)


class Totals:
    """Sums that the scoring thread writes and that anybody may read.

    The window holds the last batches: as few as have `window_tokens` tokens together, or all.
    """

    def __init__(
        self,
        kinds: Iterable[str],
        *,
        window_tokens: int = WINDOW_TOKENS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`kinds` of routers are counted from 0; `clock` gives Unix seconds."""
        self.kinds = tuple(kinds)
        self._max_window_tokens = window_tokens
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._num_requests = self._num_dropped = self._num_failed = 0
        self._tokens = Counter({modality.label: 0 for modality in Modality})
        self._decisions = Counter(dict.fromkeys(self.kinds, 0))
        self._flips = Counter({(kind, flip): 0 for kind in self.kinds for flip in FLIPS})
        self._window: deque[tuple[float, Evaluation]] = deque()
        self._window_tokens = 0
        self._confusion: dict[str, NDArray[np.int64]] = {}

    def add(self, found: Evaluation) -> None:
        with self._lock:
            self._num_requests += found.num_requests
            self._tokens.update(found.by_modality)
            for site, counts in found.confusion.items():
                kind, (_, added, missed, _) = kind_of(site), map(int, counts.sum(0))
                self._decisions[kind] += int(counts.sum())
                self._flips[kind, MISSED] += missed
                self._flips[kind, ADDED] += added
                self._confusion[site] = self._confusion.get(site, 0) + counts
            self._window.append((self._clock(), found))
            self._window_tokens += found.num_tokens
            while self._window_tokens - self._window[0][1].num_tokens >= self._max_window_tokens:
                _, old = self._window.popleft()
                self._window_tokens -= old.num_tokens
                for site, counts in old.confusion.items():
                    self._confusion[site] = self._confusion[site] - counts

    def on_dropped(self, num_samples: int) -> None:
        with self._lock:
            self._num_dropped += num_samples

    def on_failed(self) -> bool:
        """A batch could not be scored; whether it is the first one."""
        with self._lock:
            self._num_failed += 1
            return self._num_failed == 1

    def findings(self) -> Findings:
        with self._lock:
            window = list(self._window)
            return Findings(
                since=self._since,
                num_requests=self._num_requests,
                num_dropped=self._num_dropped,
                num_failed=self._num_failed,
                tokens=dict(self._tokens),
                decisions=dict(self._decisions),
                flips=dict(self._flips),
                window_since=window[0][0] if window else None,
                window_tokens=self._window_tokens,
                confusion=dict(self._confusion),
                losses={
                    name: np.sum([np.zeros(4), *(each.losses[name] for _, each in window)], axis=0)
                    for name in PASSES
                },
            )
