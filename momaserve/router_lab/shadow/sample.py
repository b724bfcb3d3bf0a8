"""Finished requests that were picked, and the bounded queue in which they wait to be scored."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from momaserve.config import RoutingPolicy

MAX_QUEUED_TOKENS = 65_536
"""Tokens that may wait: 256 KiB of ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Tokens of one answered request, and how they were routed."""

    token_ids: NDArray[np.int32]
    """[S], prompt and answer."""
    num_prompt_tokens: int
    """The first tokens, which `prompt_routing` routed; `routing` routed the others."""
    routing: RoutingPolicy
    prompt_routing: RoutingPolicy

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        answer: Sequence[int],
        routing: RoutingPolicy,
        prompt_routing: RoutingPolicy,
    ) -> Sample:
        return cls(
            token_ids=np.array([*prompt, *answer], dtype=np.int32),
            num_prompt_tokens=len(prompt),
            routing=routing,
            prompt_routing=prompt_routing,
        )


def is_picked(name: str, rate: float, seed: int = 0) -> bool:
    """Whether a request is among the share `rate`: a pure function of its name and the seed.

    What a rate picks, every higher one picks too.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    # 53 bits: a float holds them all, and none becomes 1, which a rate of 1 would pass over.
    return (int.from_bytes(digest[:8], "little") >> 11) / (1 << 53) < rate


class SampleQueue:
    """Holds samples between the event loop, which offers them, and the thread that scores them.

    Invariant: no more than `max_num_tokens` wait, or a single sample.
    """

    def __init__(self, max_num_tokens: int = MAX_QUEUED_TOKENS) -> None:
        self.max_num_tokens = max_num_tokens
        self._samples: deque[Sample] = deque()
        self._num_tokens = 0
        self._is_closed = False
        self._changed = threading.Condition()

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def offer(self, sample: Sample) -> int:
        """Put a sample at the end; returns how many of the oldest had to go for it.

        Waits for nothing but the lock, which nobody holds for long. Nothing is kept once closed.
        """
        num_dropped = 0
        with self._changed:
            if self._is_closed:
                return 0
            self._samples.append(sample)
            self._num_tokens += sample.num_tokens
            while self._num_tokens > self.max_num_tokens and len(self._samples) > 1:
                self._num_tokens -= self._samples.popleft().num_tokens
                num_dropped += 1
            self._changed.notify()
        return num_dropped

    def get(self, timeout_s: float | None) -> Sample | None:
        """The oldest sample; None when none came in time, or the queue was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._samples or self._is_closed, timeout_s)
            if not self._samples:
                return None
            sample = self._samples.popleft()
            self._num_tokens -= sample.num_tokens
            return sample

    def close(self) -> None:
        """Forget everything and wake whoever waits."""
        with self._changed:
            self._is_closed = True
            self._samples.clear()
            self._num_tokens = 0
            self._changed.notify_all()
