"""What one step computes: ids and integers only, made by the scheduler, read by the runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from momaserve.core.load import StepLoad


class PlannedSequence(NamedTuple):
    """Part of one sequence in a step: tokens at positions [start, start + num_new_tokens)."""

    request_id: str
    companion: int
    """Index among the request's companions; -1 is the request's own sequence."""
    start: int
    num_new_tokens: int
    blocks: Sequence[int]
    """Blocks of positions 0, 1, …, enough for the step's tokens. Grows with later steps: read
    it before the next one is planned."""
    entry_blocks: Sequence[int] = ()
    """Blocks of its entries in depth-routed layers, enough for all that the step may add."""
    num_entries: int = 0
    """Entries that are there, those of steps in flight left out."""
    max_num_entries: int = 0
    """Most that may be there once this step has run."""


OWN = -1
"""`PlannedSequence.companion` of a request's own sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Sequences of one step in the order of their rows."""

    sequences: tuple[PlannedSequence, ...] = ()
    samples: tuple[str, ...] = ()
    """Requests that get a token: the step computes the last token of all their sequences."""
    forks: Mapping[str, str] = field(default_factory=dict)
    """Requests of `samples` that have no row of their own yet, and whose row they sample from."""
    copies: tuple[tuple[int, int], ...] = ()
    """(from, to) blocks to be copied before the step writes anything."""
    num_tokens: int = 0
    num_preemptions: int = 0
    num_cache_queries: int = 0
    """Prompt tokens of requests that were started, which the prefix cache was asked for."""
    num_cache_hits: int = 0
    """Those of them that it had."""
    load: StepLoad | None = None
    """What the step computes; None where times are not predicted."""
    predicted_s: float | None = None
    """How long it is expected to take."""

    @property
    def num_new_tokens(self) -> dict[str, int]:
        """New tokens by request id, companions left out."""
        return {s.request_id: s.num_new_tokens for s in self.sequences if s.companion == OWN}

    def block_ids(self, request_id: str) -> tuple[int, ...]:
        """Block table of a request of this step; raises KeyError for any other."""
        for planned in self.sequences:
            if planned.request_id == request_id and planned.companion == OWN:
                return tuple(planned.blocks)
        raise KeyError(request_id)
