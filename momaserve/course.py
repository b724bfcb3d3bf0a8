"""The course of one request through the engine: what its next token may be, and what it makes
of the token that it gets. Knows no tensor, no scheduler and no other request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from momaserve.outputs import (
    FinishReason,
    RequestStats,
    TokenLogprob,
    TokenOutput,
    TokenRouting,
)
from momaserve.request import Request
from momaserve.runner.runner import StepResult
from momaserve.runner.sampler import Penalties, SampleRow
from momaserve.tally import Tally
from momaserve.tokens.grammar import Choices, Grammar, GrammarState

_BANNED = float("-inf")


class Course:
    """Grammar state, penalties, companions and timing of one request.

    Invariant: the request has companions exactly while it draws a picture with guidance.
    """

    def __init__(self, request: Request, grammar: Grammar) -> None:
        self.request = request
        self._grammar = grammar
        spec, params = grammar.spec, request.params
        self._stop_ids = frozenset(
            params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, spec.eos)
        )
        bias = list(params.logit_bias.items())
        if params.ignore_eos:
            bias.append((spec.eos, _BANNED))
        self._bias = tuple(bias)
        self._code_bias = tuple(entry for entry in bias if entry[0] in spec.image_ids)
        """Inside a picture, where no other ids are drawn."""
        self._early_bias = (*bias, *((token, _BANNED) for token in self._stop_ids))
        state = grammar.scan(request.prompt_token_ids)
        self._unsent = list(request.output_token_ids)
        for token in self._unsent:
            state = grammar.advance(state, token, params.mode).state
        self._state = state
        self._output_counts: Counter[int] = Counter(self._unsent)
        self._prompt_ids: frozenset[int] | None = (
            frozenset(request.prompt_token_ids) if _is_penalised(request) else None
        )
        self.prompt_logprobs: list[TokenLogprob] = []
        self._routing: list[TokenRouting] = []
        self._num_routed_tokens = request.num_prompt_tokens
        """Tokens up to the last one whose routing is known, the prompt included."""
        self._has_output = False
        self._scheduled_at: float | None = None
        self._first_token_at: float | None = None
        self._last_token_at: float | None = None
        self._image_started_at: float | None = None
        self._image_latencies_s: list[float] = []

    # --- before a step -----------------------------------------------------------------------

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Not any more once they are given out: a prompt may be computed again."""
        return self.request.params.prompt_logprobs is not None and not self._has_output

    def starts_step(self, now: float) -> None:
        """The request is part of a step that starts now."""
        if self._scheduled_at is None:
            self._scheduled_at = now
            if self._state.image_tokens is not None:
                self._image_started_at = now

    @property
    def may_run_ahead(self) -> bool:
        """Whether the token that is being sampled can be computed before it is known.

        Not when what follows depends on it: whether a picture begins, ends and needs no
        companions any more, or what is penalised.
        """
        request = self.request
        if request.num_tokens + request.num_pending_tokens >= request.max_num_tokens:
            return False
        if self._state.image_tokens is not None:
            return self._grammar.num_tokens_to_close(self._state) > 2
        return self._choices(0) is Choices.TEXT and self._prompt_ids is None

    def sample_row(self) -> SampleRow | None:
        """How the next token is drawn; None when none is (a prompt that is only scored).

        With a token in flight, the row is that of the token after it.
        """
        request, params = self.request, self.request.params
        num_pending = request.num_pending_tokens - 1  # the one that this row is for not counted
        if request.num_tokens + num_pending >= request.max_num_tokens:
            return None
        is_picture = self._state.image_tokens is not None
        is_early = request.num_output_tokens + num_pending < params.min_tokens
        bias = self._early_bias if is_early else self._bias
        return SampleRow(
            choices=self._choices(num_pending),
            distribution=params.image if is_picture else params.text,
            seed=request.seed,
            position=request.num_tokens + num_pending,
            bias=self._code_bias if is_picture else bias,
            penalties=None if is_picture else self._penalties(),
            guidance_scale=params.guidance_scale,
        )

    def _choices(self, num_pending: int) -> Choices:
        request = self.request
        budget = request.max_num_tokens - request.num_tokens - num_pending
        return self._grammar.choices(self._state, request.params.mode, budget)

    def _penalties(self) -> Penalties | None:
        if self._prompt_ids is None:
            return None
        params = self.request.params
        return Penalties(
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            prompt_ids=self._prompt_ids,
            output_counts=self._output_counts,
        )

    # --- after a step ------------------------------------------------------------------------

    def take_routing(self, entries: Sequence[tuple[int, TokenRouting]]) -> None:
        """What generated tokens used, by position, in order. Preemption computes some again."""
        for position, entry in entries:
            if position == self._num_routed_tokens:
                self._routing.append(entry)
                self._num_routed_tokens += 1

    def share_reports(self, leader: Course) -> None:
        """Starts where `leader` ends its prompt: what that brought to light holds for both."""
        self.prompt_logprobs = leader.prompt_logprobs
        self._routing = list(leader._routing)
        self._num_routed_tokens = leader._num_routed_tokens

    def settle(self, result: StepResult, now: float, tally: Tally) -> tuple[TokenOutput, list[int]]:
        """What the request gives out now that its last token is computed, and what it gains."""
        request = self.request
        token = result.sampled.get(request.request_id)
        new_tokens: list[int] = []
        reason: FinishReason | None = None
        stop_token: int | None = None
        if token is None:
            reason = FinishReason.LENGTH
        elif self._state.image_tokens is None and token in self._stop_ids:
            reason, stop_token = FinishReason.STOP, token
        else:
            new_tokens, reason = self._take(token, now, tally)
        output = TokenOutput(
            request_id=request.request_id,
            token_ids=(*self._unsent, *new_tokens),
            logprobs=self._logprobs(new_tokens, result),
            prompt_logprobs=tuple(self.prompt_logprobs) if self.wants_prompt_logprobs else None,
            routing=tuple(self._routing),
            num_cached_tokens=request.num_cached_tokens,
            finish_reason=reason,
            stop_token_id=stop_token,
        )
        if not self._has_output and request.leader_id is None:
            tally.prompt_tokens += request.num_prompt_tokens
        self._unsent, self._routing, self._has_output = [], [], True
        return output, new_tokens

    def _take(self, token: int, now: float, tally: Tally) -> tuple[list[int], FinishReason | None]:
        request = self.request
        advance = self._grammar.advance(self._state, token, request.params.mode)
        new_tokens = [token, *advance.forced]
        self._time_image(advance.state, now, tally)
        self._time_token(now, tally)
        tally.count((*self._unsent, *new_tokens), self._grammar.spec.image_ids)
        if self._prompt_ids is not None:
            self._output_counts.update(new_tokens)
        if advance.state.image_tokens is not None and self._state.image_tokens is not None:
            for companion in request.companions:
                companion.token_ids.append(token)
        self._state = advance.state
        if advance.finished:
            return new_tokens, FinishReason.STOP
        if request.num_tokens + len(new_tokens) >= request.max_num_tokens:
            return new_tokens, FinishReason.LENGTH
        return new_tokens, None

    @property
    def draws_picture(self) -> bool:
        return self._state.image_tokens is not None

    def _logprobs(
        self, new_tokens: Sequence[int], result: StepResult
    ) -> tuple[TokenLogprob, ...] | None:
        """One entry per token given out; forced tokens have log-probability 0."""
        if self.request.params.logprobs is None:
            return None
        entries = [TokenLogprob(token, 0.0) for token in self._unsent]
        if new_tokens:
            entries.append(result.logprobs[self.request.request_id])
            entries += [TokenLogprob(token, 0.0) for token in new_tokens[1:]]
        return tuple(entries)

    # --- timing ------------------------------------------------------------------------------

    def _time_image(self, new_state: GrammarState, now: float, tally: Tally) -> None:
        if self._state.image_tokens is None and new_state.image_tokens is not None:
            self._image_started_at = now
        elif self._state.image_tokens is not None and new_state.image_tokens is None:
            tally.images += 1
            if self._image_started_at is not None:
                self._image_latencies_s.append(now - self._image_started_at)
            self._image_started_at = None

    def _time_token(self, now: float, tally: Tally) -> None:
        if self._last_token_at is None:
            self._first_token_at = now
            tally.first_token_latencies_s.append(now - self.request.arrival_time)
        else:
            tally.inter_token_latencies_s.append(now - self._last_token_at)
        self._last_token_at = now

    def stats(self, reason: FinishReason, now: float) -> RequestStats:
        """The record of a request that ends now."""
        request = self.request
        scheduled = now if self._scheduled_at is None else self._scheduled_at
        first = now if self._first_token_at is None else self._first_token_at
        last = first if self._last_token_at is None else self._last_token_at
        num_generated = request.num_output_tokens
        return RequestStats(
            finish_reason=reason,
            num_prompt_tokens=request.num_prompt_tokens,
            num_generated_tokens=num_generated,
            queue_s=scheduled - request.arrival_time,
            prefill_s=first - scheduled,
            decode_s=last - first,
            e2e_s=now - request.arrival_time,
            time_per_output_token_s=(
                (last - first) / (num_generated - 1) if num_generated > 1 else None
            ),
            image_latencies_s=tuple(self._image_latencies_s),
        )


def _is_penalised(request: Request) -> bool:
    params = request.params
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )
