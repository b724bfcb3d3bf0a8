"""What the engine tells whoever watches it: immutable records, one per step or request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from momaserve.outputs import RequestStats


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One engine step."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    """Share of blocks in use, 0 to 1."""
    num_tokens: int
    """Tokens computed in the step, all requests together."""
    prompt_tokens: int
    generated_text_tokens: int
    generated_image_tokens: int
    images: int
    """Pictures completed."""
    num_preemptions: int
    """Running requests that gave up their blocks and wait again."""
    prefix_cache_queries: int
    """Prompt tokens of requests that were started, whose blocks were looked up in the cache."""
    prefix_cache_hits: int
    """Those of them that were there."""
    step_s: float
    """From its start, or from the end of the step before, if that was later."""
    first_token_latencies_s: tuple[float, ...]
    """Arrival to first token of requests that got theirs in this step."""
    inter_token_latencies_s: tuple[float, ...]
    expert_tokens: tuple[tuple[int, str, tuple[int, ...]], ...]
    """(layer, group, tokens per expert)."""
    group_tokens: tuple[tuple[int, str, int], ...] = ()
    """(layer, group, tokens that its router saw)."""
    experts_per_token: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By group: how many (token, layer) pairs got 0, 1, ... E experts."""
    depth_tokens: tuple[tuple[int, int, int], ...] = ()
    """(layer, tokens taken, tokens skipped)."""
    predicted_s: float | None = None
    """What `step_s` was expected to be; None where nothing is predicted."""


class StatsListener(Protocol):
    """Is called on the engine thread; must be quick and must not raise."""

    def on_step(self, stats: StepStats) -> None: ...

    def on_finished(self, stats: RequestStats) -> None: ...

    def on_rejected(self, reason: str) -> None:
        """Is called where a request was submitted, not on the engine thread."""
        ...
