"""The engine: takes requests, plans and runs steps, gives out tokens. Knows no HTTP, no thread.

One thread owns an engine (`AsyncEngine` or `LLM`). `make_requests` alone may be called from any
thread: it only reads what never changes.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from momaserve.config import EngineConfig, RoutingPolicy
from momaserve.core.plan import PlannedRequest, StepPlan
from momaserve.core.scheduler import Scheduler
from momaserve.errors import CheckpointError, ConfigError, PromptError, RequestError, SamplingError
from momaserve.loading import ModelParts, load_model_parts
from momaserve.models.config import ModelConfig
from momaserve.outputs import FinishReason, TokenLogprob, TokenOutput
from momaserve.request import Request
from momaserve.runner.kv_storage import KVStorage, choose_num_blocks
from momaserve.runner.runner import Runner, StepResult
from momaserve.runner.sampler import Sampler, SampleRow
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.stats import RequestStats, StatsListener, StepStats
from momaserve.tokens.grammar import GrammarState
from momaserve.tokens.prompt import Prompt

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Live:
    """What the engine knows of a request besides its tokens."""

    state: GrammarState
    unsent: list[int]
    """Forced tokens that no output has carried yet."""
    bias: tuple[tuple[int, float], ...]
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    has_output: bool = False
    scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    image_started_at: float | None = None
    image_latencies_s: list[float] = field(default_factory=list)


class Engine:
    """A model, its cache and its scheduler, moved forward one step at a time."""

    def __init__(
        self,
        parts: ModelParts,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError or CheckpointError when the model cannot be served as configured."""
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        model, dtype, device = parts.model, parts.dtype, parts.device
        self.config = config
        self.model = model
        self.model_config: ModelConfig = model.config
        self.processor = parts.processor
        self.defaults = parts.defaults
        self.model_name = parts.name
        self.dtype = dtype
        self.max_model_len = self._checked_model_len()
        for policy in {config.routing, config.prompt_routing or config.routing}:
            missing = model.missing_for(policy)
            if missing is not None:
                raise CheckpointError(missing)
        num_blocks = choose_num_blocks(
            model.config,
            block_size=config.cache.block_size,
            dtype=dtype,
            kv_cache_bytes=config.cache.kv_cache_bytes,
            max_num_requests=config.scheduler.max_num_requests,
            max_model_len=self.max_model_len,
        )
        self._cache_tokens = num_blocks * config.cache.block_size
        storage = KVStorage(
            model.config,
            num_blocks=num_blocks,
            block_size=config.cache.block_size,
            dtype=dtype,
            device=device,
        )
        self.scheduler = Scheduler(
            config.scheduler, num_blocks=num_blocks, block_size=config.cache.block_size
        )
        self._runner = Runner(model, storage, Sampler(parts.processor.spec, device))
        controls = parts.processor.spec.unsampled_text_ids | {model.config.eos_token_id}
        num_text = model.config.vocab_size - len(parts.processor.spec.image_ids)
        self._has_words = num_text > len(controls)
        self._clock = clock
        self._live: dict[str, _Live] = {}
        self.listener: StatsListener | None = None

    @classmethod
    def load(cls, checkpoint: Path | str, config: EngineConfig | None = None) -> Engine:
        """Load a checkpoint directory, or a preset by name with random weights.

        Raises:
            CheckpointError: the directory is broken or lacks what `config` needs.
            ConfigError: a setting that cannot work here.
        """
        config = config or EngineConfig()
        return cls(load_model_parts(checkpoint, config), config)

    def _checked_model_len(self) -> int:
        limit = self.model_config.max_position_embeddings
        wanted = self.config.max_model_len
        if wanted is not None and wanted > limit:
            raise ConfigError(
                f"max_model_len {wanted} is more than the checkpoint's "
                f"max_position_embeddings {limit}"
            )
        return wanted or limit

    # --- taking requests -------------------------------------------------------------------

    def make_requests(
        self, prompt: Prompt, params: SamplingParams, request_id: str
    ) -> list[Request]:
        """The `n` requests of a submission, checked against model and limits.

        Raises:
            PromptError: the prompt leaves no room or can never be computed.
            SamplingError: ids out of range, a picture that does not fit.
            RequestError: a routing policy that this checkpoint cannot serve.
        """
        num_prompt = len(prompt.token_ids)
        room = self.max_model_len - num_prompt
        if room < 0 or (room == 0 and params.max_tokens != 0):
            raise PromptError(
                f"the prompt has {num_prompt} tokens, but prompt and output together may have "
                f"at most {self.max_model_len}",
                param="prompt",
            )
        if params.max_tokens is None:
            num_output = max(1, min(room, self._cache_tokens - num_prompt))
        else:
            num_output = min(params.max_tokens, room)
        state = self.processor.grammar.scan(prompt.token_ids)
        self.processor.grammar.check_room(state, params.mode, num_output)
        self._check_token_ids(params)
        if params.ignore_eos and params.mode is not OutputMode.IMAGE and not self._has_words:
            raise SamplingError(
                "ignore_eos: this checkpoint's vocabulary has no text token but eos to sample",
                param="ignore_eos",
            )
        routing = params.routing or self.config.routing
        prompt_routing = params.prompt_routing or self.config.prompt_routing or routing
        for policy, name in ((routing, "routing"), (prompt_routing, "prompt_routing")):
            missing = self.model.missing_for(policy)
            if missing is not None:
                raise RequestError(missing, param=name)
        self.scheduler.check_fits(
            num_prompt + num_output,
            prompt_routing is RoutingPolicy.EXPERT_CHOICE,
            num_prompt,
        )
        self.scheduler.check_submission(params.n, params.n * num_prompt)
        seed = params.seed if params.seed is not None else secrets.randbits(62)
        opening = self.processor.grammar.opening(state, params.mode)
        now = self._clock()
        return [
            Request(
                request_id=request_id if params.n == 1 else f"{request_id}-{index}",
                prompt_token_ids=prompt.token_ids,
                params=params,
                seed=seed + index,
                routing=routing,
                prompt_routing=prompt_routing,
                max_num_tokens=num_prompt + num_output,
                arrival_time=now,
                output_token_ids=list(opening),
            )
            for index in range(params.n)
        ]

    def _check_token_ids(self, params: SamplingParams) -> None:
        vocab_size = self.model_config.vocab_size
        for name, ids in (
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", tuple(params.logit_bias)),
        ):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise SamplingError(
                        f"{name}: token id {token_id} is not between 0 and {vocab_size - 1}",
                        param=name,
                    )

    def add(self, requests: Sequence[Request]) -> None:
        """Queue the requests of one submission: all of them or none.

        Raises:
            QueueFullError: no room for them.
        """
        self.scheduler.add_all(requests)
        grammar = self.processor.grammar
        for request in requests:
            state = grammar.scan(request.prompt_token_ids)
            for token in request.output_token_ids:
                state = grammar.advance(state, token, request.params.mode).state
            bias = list(request.params.logit_bias.items())
            if request.params.ignore_eos:
                bias.append((self.model_config.eos_token_id, float("-inf")))
            live = _Live(state, list(request.output_token_ids), tuple(bias))
            self._live[request.request_id] = live

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> bool:
        """End a request in any state; its blocks are free at once. False if it is unknown.

        Args:
            reason: what the statistics say; STOP when its reader found a stop string.
        """
        live = self._live.pop(request_id, None)
        request = self.scheduler.requests.get(request_id)
        found = self.scheduler.abort(request_id)
        if live is not None and request is not None:
            self._tell_finished(request, live, reason)
        return found

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    # --- one step --------------------------------------------------------------------------

    def step(self) -> list[TokenOutput]:
        """Plan and run one step; returns the outputs of requests that got tokens or ended."""
        started = self._clock()
        plan = self.scheduler.schedule()
        if not plan.requests:
            return []
        requests = self.scheduler.requests
        rows: dict[str, SampleRow] = {}
        for planned in plan.requests:
            live = self._live[planned.request_id]
            if live.scheduled_at is None:
                live.scheduled_at = started
                if live.state.image_tokens is not None:
                    live.image_started_at = started
            if planned.samples:
                row = self._sample_row(requests[planned.request_id], live)
                if row is not None:
                    rows[planned.request_id] = row
        try:
            result = self._runner.execute(
                plan, requests, rows, count_routing=self.listener is not None
            )
        except Exception as error:  # a broken step ends its requests, not the engine
            logger.exception("a step failed; its %d requests are ended", len(plan.requests))
            why = type(error).__name__
            return [self._fail(planned.request_id, why) for planned in plan.requests]
        return self._settle(plan, result, started)

    def _sample_row(self, request: Request, live: _Live) -> SampleRow | None:
        """How the next token is drawn; None when none is (a prompt that is only scored)."""
        budget = request.max_num_tokens - request.num_tokens
        if budget <= 0:
            return None
        params = request.params
        in_image = live.state.image_tokens is not None
        return SampleRow(
            choices=self.processor.grammar.choices(live.state, params.mode, budget),
            distribution=params.image if in_image else params.text,
            seed=request.seed,
            position=request.num_tokens,
            bias=live.bias,
        )

    def _settle(self, plan: StepPlan, result: StepResult, started: float) -> list[TokenOutput]:
        """Take the sampled tokens into the requests and find out who is finished."""
        now = self._clock()
        tally = _Tally()
        outputs: list[TokenOutput] = []
        sampled: dict[str, list[int]] = {}
        finished: list[tuple[Request, _Live, FinishReason]] = []
        requests = self.scheduler.requests
        for planned in plan.requests:
            request, live = requests[planned.request_id], self._live[planned.request_id]
            tally.prompt_tokens += _prompt_part(planned, request)
            live.prompt_logprobs += result.prompt_logprobs.get(request.request_id, ())
            if request.request_id in result.broken:
                outputs.append(self._fail(request.request_id, "its logits are not finite"))
                continue
            if not planned.samples:
                continue
            output, new_tokens = self._advance(request, live, result, now, tally)
            outputs.append(output)
            if new_tokens:
                sampled[request.request_id] = new_tokens
            if output.finish_reason is not None:
                finished.append((request, live, output.finish_reason))
        self.scheduler.update(plan, sampled, [request.request_id for request, _, _ in finished])
        for request, live, reason in finished:
            del self._live[request.request_id]
            self._tell_finished(request, live, reason)
        self._tell_step(plan, result, tally, now - started)
        return outputs

    def _advance(
        self, request: Request, live: _Live, result: StepResult, now: float, tally: _Tally
    ) -> tuple[TokenOutput, list[int]]:
        """What a request whose last token was computed gives out, and the tokens it gains."""
        params = request.params
        token = result.sampled.get(request.request_id)
        new_tokens: list[int] = []
        reason: FinishReason | None = None
        stop_token: int | None = None
        if token is None:
            reason = FinishReason.LENGTH
        elif live.state.image_tokens is None and token in self._stop_ids(params):
            reason, stop_token = FinishReason.STOP, token
        else:
            advance = self.processor.grammar.advance(live.state, token, params.mode)
            new_tokens = [token, *advance.forced]
            self._time_image(live, advance.state, now, tally)
            self._time_token(request, live, now, tally)
            tally.count((*live.unsent, *new_tokens), self.processor.spec.image_ids)
            live.state = advance.state
            if advance.finished:
                reason = FinishReason.STOP
            elif request.num_tokens + len(new_tokens) >= request.max_num_tokens:
                reason = FinishReason.LENGTH
        # A request's first output carries them all: the whole prompt was computed before it.
        is_first = params.prompt_logprobs is not None and not live.has_output
        scored = tuple(live.prompt_logprobs) if is_first else None
        output = TokenOutput(
            request_id=request.request_id,
            token_ids=(*live.unsent, *new_tokens),
            logprobs=_token_logprobs(request, live.unsent, new_tokens, result),
            prompt_logprobs=scored,
            finish_reason=reason,
            stop_token_id=stop_token,
        )
        live.unsent, live.prompt_logprobs, live.has_output = [], [], True
        return output, new_tokens

    def _stop_ids(self, params: SamplingParams) -> tuple[int, ...]:
        eos = self.model_config.eos_token_id
        return params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, eos)

    def _fail(self, request_id: str, why: str) -> TokenOutput:
        live = self._live.pop(request_id)
        request = self.scheduler.requests[request_id]
        self.scheduler.abort(request_id)
        self._tell_finished(request, live, FinishReason.ERROR)
        return TokenOutput(
            request_id=request_id,
            token_ids=(),
            finish_reason=FinishReason.ERROR,
            error=f"the engine could not compute this request: {why}",
        )

    # --- timing and statistics -------------------------------------------------------------

    @staticmethod
    def _time_image(live: _Live, new_state: GrammarState, now: float, tally: _Tally) -> None:
        if live.state.image_tokens is None and new_state.image_tokens is not None:
            live.image_started_at = now
        elif live.state.image_tokens is not None and new_state.image_tokens is None:
            tally.images += 1
            if live.image_started_at is not None:
                live.image_latencies_s.append(now - live.image_started_at)
            live.image_started_at = None

    @staticmethod
    def _time_token(request: Request, live: _Live, now: float, tally: _Tally) -> None:
        if live.last_token_at is None:
            live.first_token_at = now
            tally.first_token_latencies_s.append(now - request.arrival_time)
        else:
            tally.inter_token_latencies_s.append(now - live.last_token_at)
        live.last_token_at = now

    def _tell_step(self, plan: StepPlan, result: StepResult, tally: _Tally, step_s: float) -> None:
        if self.listener is None:
            return
        self.listener.on_step(
            StepStats(
                num_running=self.scheduler.num_running,
                num_waiting=self.scheduler.num_waiting,
                kv_cache_usage=self.scheduler.kv_cache.usage,
                num_tokens=plan.num_tokens,
                prompt_tokens=tally.prompt_tokens,
                generated_text_tokens=tally.text_tokens,
                generated_image_tokens=tally.image_tokens,
                images=tally.images,
                step_s=step_s,
                first_token_latencies_s=tuple(tally.first_token_latencies_s),
                inter_token_latencies_s=tuple(tally.inter_token_latencies_s),
                expert_tokens=result.routing.expert_tokens,
                experts_per_token=result.routing.experts_per_token,
                depth_tokens=result.routing.depth_tokens,
            )
        )

    def _tell_finished(self, request: Request, live: _Live, reason: FinishReason) -> None:
        if self.listener is None:
            return
        now = self._clock()
        scheduled = live.scheduled_at if live.scheduled_at is not None else now
        first = live.first_token_at if live.first_token_at is not None else now
        last = live.last_token_at if live.last_token_at is not None else first
        num_generated = len(request.output_token_ids)
        self.listener.on_finished(
            RequestStats(
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
                image_latencies_s=tuple(live.image_latencies_s),
            )
        )


@dataclass(slots=True)
class _Tally:
    """Counts of one step while its results are settled."""

    prompt_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    images: int = 0
    first_token_latencies_s: list[float] = field(default_factory=list)
    inter_token_latencies_s: list[float] = field(default_factory=list)

    def count(self, token_ids: Iterable[int], image_ids: range) -> None:
        for token in token_ids:
            if token in image_ids:
                self.image_tokens += 1
            else:
                self.text_tokens += 1


def _prompt_part(planned: PlannedRequest, request: Request) -> int:
    """Prompt tokens among those computed in the step."""
    stop = planned.start + planned.num_new_tokens
    return max(0, min(stop, request.num_prompt_tokens) - planned.start)


def _token_logprobs(
    request: Request, unsent: Sequence[int], new_tokens: Sequence[int], result: StepResult
) -> tuple[TokenLogprob, ...] | None:
    """One entry per token given out; forced tokens have log-probability 0."""
    if request.params.logprobs is None:
        return None
    entries = [TokenLogprob(token, 0.0) for token in unsent]
    if new_tokens:
        entries.append(result.logprobs[request.request_id])
        entries += [TokenLogprob(token, 0.0) for token in new_tokens[1:]]
    return tuple(entries)
