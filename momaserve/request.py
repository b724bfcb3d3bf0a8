"""A request outside and inside the engine: as it is submitted, and as it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from momaserve.config import RoutingPolicy
from momaserve.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A prompt with its sampling, checked and complete: the n requests that are to be.

    Immutable and made of plain values, so that it may cross to another thread or process.
    """

    request_ids: tuple[str, ...]
    """One per choice."""
    prompt_token_ids: tuple[int, ...]
    opening: tuple[int, ...]
    """Forced tokens that each answer begins with."""
    params: SamplingParams
    seed: int
    """Of the first choice; the others count on from it."""
    routing: RoutingPolicy
    prompt_routing: RoutingPolicy
    max_num_tokens: int
    num_companions: int
    arrival_time: float
    """Seconds on the engine's monotonic clock."""


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class TokenSequence:
    """Tokens of one context of the model, and the blocks that hold their K/V.

    `num_computed_tokens` runs after `num_tokens`; nothing else says whether a sequence is in
    its prompt or decoding. The scheduler and its KV cache own every field but `token_ids`.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    """The first tokens, which `prompt_routing` routes; `routing` routes the others."""
    routing: RoutingPolicy
    prompt_routing: RoutingPolicy
    root_key: bytes | None = None
    """Whom blocks may be shared with (`core.block_key.root_key`); None is nobody."""
    max_cached_tokens: int | None = None
    """First tokens that the prefix cache may spare it; None is all of them."""
    num_computed_tokens: int = 0
    """Tokens whose K/V are there once the steps in flight have run."""
    blocks: list[int] = field(default_factory=list)
    """Blocks of positions 0, 1, …; the one to be written next may be replaced (copy on write)."""
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of its full blocks, as far as they were needed."""
    num_committed_blocks: int = 0
    """Full blocks that the prefix cache was offered."""
    entry_blocks: list[int] = field(default_factory=list)
    """Blocks of what depth-routed layers keep of the tokens that it computed itself."""
    num_entries: int = 0
    """What they hold, as of the last step that was settled (`core.entries`)."""
    max_num_entries: int = 0
    """What they may hold once the steps in flight have run."""
    num_reserved_tokens: int = 0
    """First tokens whose room it keeps though they are not computed."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One answer being computed. A submission with n > 1 becomes n of these.

    Owned by the engine thread. Its companions (guidance) are sequences of their own that step,
    are preempted and end with it; each of them draws the same picture from another prompt.
    """

    request_id: str
    sequence: TokenSequence
    """Prompt and output."""
    params: SamplingParams
    seed: int
    max_num_tokens: int
    """Prompt and output together never exceed this."""
    max_num_companion_tokens: int = 0
    """Most tokens of one companion."""
    num_companions: int = 0
    """Companions that it has while it draws a picture; their room is counted throughout."""
    companions: list[TokenSequence] = field(default_factory=list)
    """Those of the picture that is being drawn; empty between pictures."""
    leader_id: str | None = None
    """The first of the n samples of one prompt, whose prompt this one shares."""
    arrival_time: float = 0.0
    """Seconds on the engine's monotonic clock."""
    deadline: float | None = None
    """When it ends unfinished, on the same clock."""
    status: RequestStatus = RequestStatus.WAITING
    arrival_order: int = 0
    """Set by the scheduler: ties of priority go to the smaller one."""
    num_pending_tokens: int = 0
    """Tokens that the steps in flight are sampling."""
    num_preemptions: int = 0
    num_passes: int = 0
    """Younger requests of its priority that started while it waited in the queue."""
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed for it, because their blocks were in the cache."""

    @property
    def num_prompt_tokens(self) -> int:
        return self.sequence.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.sequence.token_ids)

    @property
    def num_sequences(self) -> int:
        """Sequences that count against the limits, companions that are not there yet included."""
        return 1 + self.num_companions

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        return self.sequence.token_ids[: self.sequence.num_prompt_tokens]

    @property
    def output_token_ids(self) -> Sequence[int]:
        return self.sequence.token_ids[self.sequence.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.sequence.token_ids) - self.sequence.num_prompt_tokens
