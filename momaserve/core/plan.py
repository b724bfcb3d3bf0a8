"""What one step computes: ids and integers only, made by the scheduler, read by the runner."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """The part of one request in a step: tokens at positions [start, start + num_new_tokens)."""

    request_id: str
    start: int
    num_new_tokens: int
    block_ids: tuple[int, ...]
    """Blocks of positions 0, 1, …; they cover at least `start + num_new_tokens` tokens."""
    samples: bool
    """Whether this step reaches the request's last token, so that a next one is sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Requests of one step in the order of their rows."""

    requests: tuple[PlannedRequest, ...]

    @property
    def num_tokens(self) -> int:
        return sum(r.num_new_tokens for r in self.requests)

    @property
    def num_new_tokens(self) -> dict[str, int]:
        """New tokens by request id."""
        return {r.request_id: r.num_new_tokens for r in self.requests}

    def block_ids(self, request_id: str) -> tuple[int, ...]:
        """Block table of a request of this step; raises KeyError for any other."""
        for planned in self.requests:
            if planned.request_id == request_id:
                return planned.block_ids
        raise KeyError(request_id)
