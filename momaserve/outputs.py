"""What comes out of the engine: immutable messages, one per request and step that made tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TIMEOUT = "timeout"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities at one position, over the whole vocabulary, before masks and sampling."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest (token id, log-probability) pairs, best first."""


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """Which experts computed one token."""

    token_id: int
    group: str
    """The expert group that serves the token's modality."""
    experts: tuple[tuple[int, ...] | None, ...]
    """By layer: indices within the group; None where a depth-routed layer let the token pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """One finished request (each of the n choices is one)."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_generated_tokens: int
    queue_s: float
    """Arrival to first scheduled step."""
    prefill_s: float
    """First scheduled step to first token."""
    decode_s: float
    """First token to last."""
    e2e_s: float
    time_per_output_token_s: float | None
    """None with fewer than two generated tokens."""
    image_latencies_s: tuple[float, ...] = ()
    """One per picture: from begin_image, or from the request's first step where the picture was
    begun before it, to the last code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """New tokens of one request.

    `begin_image` and `end_image` ids that the grammar forced are among the tokens; a forced
    token carries the log-probability 0 (the grammar left no choice).
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One per token of `token_ids`, when the request asked for them."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Entries for prompt tokens 1, 2, … (the first token has none); on one output only."""
    routing: tuple[TokenRouting, ...] = ()
    """Of generated tokens, in their order, when the request asked for it. A token's own is known
    in the step after the one that sampled it, so these lag behind `token_ids`. What ends an
    answer (the last token, or the last code of a picture and end_image) is never computed and
    has none."""
    num_cached_tokens: int = 0
    """Prompt tokens that were in the prefix cache; the same on all outputs of a request."""
    finish_reason: FinishReason | None = None
    """Set on the last output of a request."""
    stop_token_id: int | None = None
    """The id that ended the request, if one did; it is not among `token_ids`."""
    stats: RequestStats | None = None
    """Its timings, on the last output."""
    error: str | None = None
    """What went wrong, when `finish_reason` is ERROR."""

    @classmethod
    def joined(cls, outputs: Sequence[TokenOutput]) -> TokenOutput:
        """Consecutive outputs of one request as one."""
        if len(outputs) == 1:
            return outputs[0]
        scored = [output.logprobs for output in outputs if output.logprobs is not None]
        prompts = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
        return replace(
            outputs[-1],
            token_ids=tuple(token for output in outputs for token in output.token_ids),
            logprobs=tuple(entry for part in scored for entry in part) if scored else None,
            prompt_logprobs=prompts[0] if prompts else None,
            routing=tuple(entry for output in outputs for entry in output.routing),
        )
