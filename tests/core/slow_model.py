"""A slow, obvious scheduler: it recounts everything it needs each time it is asked.

It shares no code with momaserve.core and says nothing about block ids. `KVMemory` checks those
by content: what a request wrote at a position must still be there when the position is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from momaserve.core.plan import StepPlan


@dataclass
class SlowRequest:
    request_id: str
    num_prompt: int
    num_tokens: int
    max_num_tokens: int
    whole: bool
    num_computed: int = 0
    running: bool = False

    @property
    def missing(self) -> int:
        return self.num_tokens - self.num_computed


@dataclass
class SlowScheduler:
    num_blocks: int
    block_size: int
    max_num_requests: int
    max_num_step_tokens: int
    max_queued_requests: int
    max_queued_tokens: int

    def __post_init__(self) -> None:
        self.requests: list[SlowRequest] = []  # in order of arrival, waiting and running

    def get(self, request_id: str) -> SlowRequest | None:
        return next((r for r in self.requests if r.request_id == request_id), None)

    def running(self) -> list[SlowRequest]:
        return [r for r in self.requests if r.running]

    def waiting(self) -> list[SlowRequest]:
        return [r for r in self.requests if not r.running]

    def blocks(self, num_tokens: int) -> int:
        return math.ceil(num_tokens / self.block_size)

    def has_room_for(self, new: list[SlowRequest]) -> bool:
        queue = self.waiting() + new
        return (
            len(queue) <= self.max_queued_requests
            and sum(r.num_prompt for r in queue) <= self.max_queued_tokens
        )

    def schedule(self) -> list[tuple[str, int, int, bool]]:
        """Rows (id, start, new tokens, samples) of the next step; admits."""
        rows: list[tuple[SlowRequest, int]] = []
        order = sorted(self.running(), key=lambda r: r.missing)
        for request in order:
            others = len(order) - len(rows) - 1
            left = self.max_num_step_tokens - sum(n for _, n in rows) - others
            rows.append((request, min(request.missing, left)))
        for request in self.waiting():
            left = self.max_num_step_tokens - sum(n for _, n in rows)
            new = min(request.missing, left)
            reserved = sum(self.blocks(r.max_num_tokens) for r in self.running())
            if (
                len(self.running()) == self.max_num_requests
                or new == 0
                or (request.whole and new < request.num_prompt)
                or reserved + self.blocks(request.max_num_tokens) > self.num_blocks
            ):
                break
            request.running = True
            rows.append((request, new))
        return [(r.request_id, r.num_computed, n, n == r.missing) for r, n in rows]

    def num_used_blocks(self) -> int:
        return sum(self.blocks(r.num_computed) for r in self.running())


class KVMemory:
    """The content of every slot, as (owner, position)."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._slots: dict[tuple[int, int], tuple[object, int]] = {}

    def run(self, plan: StepPlan, owners: dict[str, object]) -> None:
        """Writes the new positions of a step, then reads all positions up to them."""
        size = self._block_size
        for r in plan.requests:
            for position in range(r.start, r.start + r.num_new_tokens):
                slot = (r.block_ids[position // size], position % size)
                self._slots[slot] = (owners[r.request_id], position)
        for r in plan.requests:
            for position in range(r.start + r.num_new_tokens):
                slot = (r.block_ids[position // size], position % size)
                owner, written = self._slots[slot]
                assert owner is owners[r.request_id] and written == position, (r, slot)
