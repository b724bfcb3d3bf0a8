"""The engine: takes requests, plans and runs steps, gives out tokens. Knows no HTTP, no thread.

One thread owns an engine (`AsyncEngine` or `LLM`). `make_submission` alone may be called from any
thread: it only reads what never changes.
"""

from __future__ import annotations

import heapq
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from momaserve.config import EngineConfig, RoutingPolicy
from momaserve.core.block_key import root_key
from momaserve.core.cost_model import MachineRates
from momaserve.core.entries import EntryShape
from momaserve.core.plan import OWN, StepPlan
from momaserve.core.scheduler import Scheduler
from momaserve.course import Course
from momaserve.errors import CheckpointError, ConfigError, PromptError, RequestError
from momaserve.loading import ModelParts, load_model_parts
from momaserve.models.config import ModelConfig
from momaserve.outputs import FinishReason, RequestStats, TokenOutput
from momaserve.request import Request, Submission, TokenSequence
from momaserve.runner.backends import select_backend
from momaserve.runner.kv_storage import KVStorage, choose_num_blocks
from momaserve.runner.runner import Runner, RunningStep, StepResult
from momaserve.runner.sampler import Sampler
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.sampling_checks import check_token_ids, check_words_left
from momaserve.stats import StatsListener
from momaserve.step_timer import StepTimer, make_forecast
from momaserve.tally import Tally
from momaserve.tokens.grammar import GrammarState
from momaserve.tokens.prompt import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flight:
    """A step that was planned and started, and is not settled yet."""

    plan: StepPlan
    courses: dict[str, Course]
    """Of every request in it."""
    running: RunningStep | Exception
    """What went wrong when it was to be started, or the step."""
    started: float


class Engine:
    """A model, its cache and its scheduler, moved forward one step at a time."""

    def __init__(
        self,
        parts: ModelParts,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        rates: MachineRates | None = None,
    ) -> None:
        """
        Args:
            rates: what router-aware scheduling takes the machine for; None measures it.

        Raises:
            ConfigError, CheckpointError: the model cannot be served as configured.
        """
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
        self._missing_for = {policy: model.missing_for(policy) for policy in RoutingPolicy}
        for policy in {config.routing, config.prompt_routing or config.routing}:
            missing = self._missing_for[policy]
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
        storage = KVStorage(
            model.config,
            num_blocks=num_blocks,
            block_size=config.cache.block_size,
            dtype=dtype,
            device=device,
        )
        layout = storage.layout
        forecast = make_forecast(config.scheduler, model.config, dtype, device, rates)
        self.step_timer = StepTimer(forecast)
        self.scheduler = Scheduler(
            config.scheduler,
            num_blocks=num_blocks,
            block_size=config.cache.block_size,
            prefix_caching=config.cache.prefix_caching,
            entries=EntryShape(len(layout.routed), layout.slots_per_block)
            if layout.routed
            else None,
            forecast=forecast,
        )
        sampler = Sampler(parts.processor.spec, device)
        keep = config.keep_weights
        backend = select_backend(config.backend, model, storage, sampler, keep_weights=keep)
        self.backend_name = backend.name
        self._runner = Runner(model.config, backend, storage)
        # With a device of its own, the next step is planned while this one runs.
        self._plans_ahead = device.type != "cpu" if config.plan_ahead is None else config.plan_ahead
        self._clock = clock
        self._courses: dict[str, Course] = {}
        self._flights: deque[_Flight] = deque()
        self._deadlines: list[tuple[float, str]] = []
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

    def make_submission(
        self, prompt: Prompt, params: SamplingParams, request_id: str
    ) -> Submission:
        """A prompt with its sampling, checked against model and limits.

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
        state = self.processor.grammar.scan(prompt.token_ids)
        num_companions = self._num_companions(params, state)
        if params.max_tokens is None:
            cache = self.scheduler.kv_cache
            taken = num_companions * cache.blocks_for(self.processor.spec.num_image_span_tokens)
            num_tokens = cache.tokens_in(max(0, cache.num_blocks - taken))
            num_output = max(1, min(room, num_tokens - num_prompt))
        else:
            num_output = min(params.max_tokens, room)
        self.processor.grammar.check_room(state, params.mode, num_output)
        check_token_ids(params, self.model_config.vocab_size)
        check_words_left(params, self.processor.spec)
        routing = params.routing or self.config.routing
        prompt_routing = params.prompt_routing or self.config.prompt_routing or routing
        for policy, name in ((routing, "routing"), (prompt_routing, "prompt_routing")):
            missing = self._missing_for[policy]
            if missing is not None:
                raise RequestError(missing, param=name)
        submission = Submission(
            request_ids=(
                (request_id,)
                if params.n == 1
                else tuple(f"{request_id}-{index}" for index in range(params.n))
            ),
            prompt_token_ids=prompt.token_ids,
            opening=self.processor.grammar.opening(state, params.mode),
            params=params,
            seed=params.seed if params.seed is not None else secrets.randbits(62),
            routing=routing,
            prompt_routing=prompt_routing,
            max_num_tokens=num_prompt + num_output,
            num_companions=num_companions,
            arrival_time=self._clock(),
        )
        self.scheduler.check_fits(self._make_request(submission, 0))
        self.scheduler.check_submission(params.n, params.n * num_prompt)
        return submission

    def _make_request(self, submission: Submission, index: int) -> Request:
        """Choice `index` of a submission, ready to be queued."""
        params = submission.params
        is_whole = submission.prompt_routing is RoutingPolicy.EXPERT_CHOICE
        sequence = TokenSequence(
            token_ids=[*submission.prompt_token_ids, *submission.opening],
            num_prompt_tokens=len(submission.prompt_token_ids),
            routing=submission.routing,
            prompt_routing=submission.prompt_routing,
            # What expert choice makes of a token depends on the whole prompt.
            root_key=None if is_whole else root_key(params.cache_salt),
            max_cached_tokens=(
                len(submission.prompt_token_ids) if params.include_routing else None
            ),
        )
        arrival = submission.arrival_time
        request = Request(
            request_id=submission.request_ids[index],
            sequence=sequence,
            params=params,
            seed=submission.seed + index,
            max_num_tokens=submission.max_num_tokens,
            leader_id=submission.request_ids[0] if index else None,
            arrival_time=arrival,
            deadline=None if params.timeout_s is None else arrival + params.timeout_s,
            num_companions=submission.num_companions,
            max_num_companion_tokens=self.processor.spec.num_image_span_tokens,
        )
        grammar = self.processor.grammar
        codes = grammar.scan(submission.prompt_token_ids).image_tokens
        if request.num_companions and (submission.opening or codes is not None):
            self._begin_companions(request, codes or 0)
        return request

    @staticmethod
    def _num_companions(params: SamplingParams, state: GrammarState) -> int:
        """Sequences besides its own that an answer needs while it draws a picture."""
        may_draw = params.mode is not OutputMode.TEXT or state.image_tokens is not None
        return int(may_draw and params.guidance_scale != 1.0)

    def _begin_companions(self, request: Request, num_codes: int) -> None:
        """Give a request that draws a picture, with `num_codes` codes so far, its companions."""
        spec = self.processor.spec
        assert spec.begin_image is not None
        sequence = request.sequence
        codes = sequence.token_ids[sequence.num_tokens - num_codes :]
        request.companions.append(
            TokenSequence(
                token_ids=[spec.bos, spec.begin_image, *codes],
                num_prompt_tokens=0,
                routing=sequence.routing,
                prompt_routing=sequence.routing,
                root_key=root_key(request.params.cache_salt),
            )
        )

    def add(self, submission: Submission) -> None:
        """Queue the requests of a submission: all of them or none.

        Raises:
            QueueFullError: no room for them.
        """
        requests = [self._make_request(submission, i) for i in range(submission.params.n)]
        self.scheduler.add_all(requests)
        for request in requests:
            self._courses[request.request_id] = Course(request, self.processor.grammar)
            if request.deadline is not None:
                heapq.heappush(self._deadlines, (request.deadline, request.request_id))

    def abort(
        self, request_id: str, reason: FinishReason = FinishReason.ABORT
    ) -> RequestStats | None:
        """End a request in any state; its blocks are free at once. None if it is unknown.

        Args:
            reason: what the statistics say; STOP when its reader found a stop string.
        """
        course = self._courses.pop(request_id, None)
        if course is None:
            return None
        stats = self._finish(course, reason)
        self.scheduler.abort(request_id)
        return stats

    @property
    def kv_cache_bytes(self) -> int:
        """Memory of K/V, and of the index of what depth-routed layers keep."""
        return self._runner.storage.num_bytes

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._flights)

    # --- one step --------------------------------------------------------------------------

    def step(self) -> list[TokenOutput]:
        """Take one step further; returns the outputs of requests that got tokens or ended.

        Where steps are planned ahead, the next one is planned and started before the oldest is
        waited for.
        """
        outputs = self._end_late()
        if not self._flights:
            self._launch()
        if self._plans_ahead and self._flights:
            last = self._flights[-1]
            if isinstance(last.running, RunningStep):  # nothing goes on top of a failed step
                self._launch(after=last)
        if self._flights:
            outputs += self._settle(self._flights.popleft())
        return outputs

    def _end_late(self) -> list[TokenOutput]:
        """End the requests whose deadline has passed."""
        outputs: list[TokenOutput] = []
        if len(self._deadlines) > 64 + 2 * len(self._courses):  # most ended before theirs
            self._deadlines = [d for d in self._deadlines if d[1] in self._courses]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= self._clock():
            deadline, name = heapq.heappop(self._deadlines)
            course = self._courses.get(name)
            if course is not None and course.request.deadline == deadline:
                stats = self.abort(name, FinishReason.TIMEOUT)
                outputs.append(
                    TokenOutput(
                        request_id=name,
                        token_ids=(),
                        num_cached_tokens=course.request.num_cached_tokens,
                        finish_reason=FinishReason.TIMEOUT,
                        stats=stats,
                    )
                )
        return outputs

    def _launch(self, after: _Flight | None = None) -> None:
        """Plan and start a step, on top of one in flight or of none; no step when nothing is
        to be computed."""
        started = self._clock()
        before = None if after is None else after.running
        assert not isinstance(before, Exception)
        ahead = (
            [name for name in after.plan.samples if self._may_run_ahead(name, after)]
            if after is not None
            else ()
        )
        plan = self.scheduler.schedule(ahead)
        if not plan.sequences:
            return
        names = dict.fromkeys([*(s.request_id for s in plan.sequences), *plan.samples])
        courses = {name: self._courses[name] for name in names}
        for course in courses.values():
            course.starts_step(started)
        rows = {name: courses[name].sample_row() for name in plan.samples}
        running: RunningStep | Exception
        try:
            running = self._runner.execute(
                plan,
                self.scheduler.requests,
                {name: row for name, row in rows.items() if row is not None},
                scored=[n for n, course in courses.items() if course.wants_prompt_logprobs],
                traced=[n for n, c in courses.items() if c.request.params.include_routing],
                after=before,
                count_routing=self.listener is not None,
            )
        except Exception as error:  # a broken step ends its requests, not the engine
            running = error
        self._flights.append(_Flight(plan=plan, courses=courses, running=running, started=started))

    def _may_run_ahead(self, name: str, flight: _Flight) -> bool:
        course = self._courses.get(name)
        return course is flight.courses[name] and course.may_run_ahead

    def _settle(self, flight: _Flight) -> list[TokenOutput]:
        """Take what a step sampled into its requests and find out who is finished."""
        try:
            if isinstance(flight.running, Exception):
                raise flight.running
            result = flight.running.result()
        except Exception as error:
            logger.exception("a step failed; its %d requests are ended", len(flight.courses))
            self._runner.check_device()
            return self._fail_all(flight, type(error).__name__)
        now = self._clock()
        tally = Tally()
        outputs: list[TokenOutput] = []
        sampled: dict[str, list[int]] = {}
        ended: dict[str, int] = {}  # where their last outputs are
        alive = {n: c for n, c in flight.courses.items() if self._courses.get(n) is c}
        self._take_reports(flight, result)
        for name in result.broken & alive.keys():
            outputs.append(self._fail(alive.pop(name), "its logits are not finite"))
        for name in flight.plan.samples:
            course = alive.get(name)
            if course is None:
                continue
            output, new_tokens = course.settle(result, now, tally)
            outputs.append(output)
            if new_tokens:
                sampled[name] = new_tokens
            if output.finish_reason is not None:
                ended[name] = len(outputs) - 1
        self.scheduler.update(flight.plan, sampled, ended, result.entry_counts)
        for name in sampled.keys() - ended:
            self._move_companions(alive[name])
        for name, index in ended.items():
            output = outputs[index]
            assert output.finish_reason is not None
            stats = self._finish(self._courses.pop(name), output.finish_reason)
            outputs[index] = replace(output, stats=stats)
        step_s = self.step_timer.settle(flight.plan, flight.started, now)
        self._tell_step(flight, result, tally, step_s)
        return outputs

    def _move_companions(self, course: Course) -> None:
        """Begin or end companions with the picture that they draw along."""
        request = course.request
        if not request.num_companions or course.draws_picture == bool(request.companions):
            return
        if course.draws_picture:
            self._begin_companions(request, 0)
        else:
            self.scheduler.end_companions(request)

    @staticmethod
    def _take_reports(flight: _Flight, result: StepResult) -> None:
        """Prompt scores and routing, also of a request that has ended meanwhile: its samples
        start from what it computed."""
        for name, entries in result.token_routing.items():
            flight.courses[name].take_routing(entries)
        for planned in flight.plan.sequences:
            scored = result.prompt_logprobs.get(planned.request_id)
            if scored is None or planned.companion != OWN:
                continue
            course = flight.courses[planned.request_id]
            if planned.start == 0:  # also when it is computed again after a preemption
                course.prompt_logprobs = []
            course.prompt_logprobs += scored
        for follower, leader in flight.plan.forks.items():
            flight.courses[follower].share_reports(flight.courses[leader])

    def _fail_all(self, flight: _Flight, why: str) -> list[TokenOutput]:
        """End what a failed step computed, and what was started on top of it.

        Steps in flight may have taken blocks for computed that the failed one was to fill.
        """
        outputs: list[TokenOutput] = []
        for failed in (flight, *self._flights):
            for name, course in failed.courses.items():
                if self._courses.get(name) is course:
                    outputs.append(self._fail(course, why))
            self.scheduler.update(failed.plan, {}, ())
        self._flights.clear()
        self.scheduler.kv_cache.forget_all()
        return outputs

    def _fail(self, course: Course, why: str) -> TokenOutput:
        """End a request whose blocks may hold anything."""
        name = course.request.request_id
        del self._courses[name]
        self.scheduler.abort(name, broken=True)
        stats = self._finish(course, FinishReason.ERROR)
        return TokenOutput(
            request_id=name,
            token_ids=(),
            num_cached_tokens=course.request.num_cached_tokens,
            finish_reason=FinishReason.ERROR,
            stats=stats,
            error=f"the engine could not compute this request: {why}",
        )

    # --- statistics --------------------------------------------------------------------------

    def _tell_step(self, flight: _Flight, result: StepResult, tally: Tally, step_s: float) -> None:
        if self.listener is None:
            return
        stats = tally.step_stats(flight.plan, result.routing, self.scheduler, step_s)
        self.listener.on_step(stats)

    def _finish(self, course: Course, reason: FinishReason) -> RequestStats:
        """The record of a request that ends now; the listener gets it too."""
        stats = course.stats(reason, self._clock())
        if self.listener is not None:
            self.listener.on_finished(stats)
        return stats
