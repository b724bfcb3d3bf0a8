"""A request inside the engine: its tokens and how far they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from momaserve.config import RoutingPolicy
from momaserve.sampling import SamplingParams


class RequestStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True)
class Request:
    """One sequence being computed. A submission with n > 1 becomes n of these.

    Owned by the engine thread. `num_computed_tokens` runs after `num_tokens`; nothing else
    says whether the request is in its prompt or decoding.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    seed: int
    routing: RoutingPolicy
    """Policy of generated tokens."""
    prompt_routing: RoutingPolicy
    """Policy of the prompt's tokens."""
    max_num_tokens: int
    """Prompt and output together never exceed this."""
    arrival_time: float = 0.0
    """Seconds on the engine's monotonic clock."""
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids at positions [start, stop)."""
        prompt = self.num_prompt_tokens
        if start >= prompt:
            return self.output_token_ids[start - prompt : stop - prompt]
        head = list(self.prompt_token_ids[start:stop])
        return head + self.output_token_ids[: max(0, stop - prompt)]
