"""Chooses what each step computes. Knows no tensor, no device, no socket and no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from momaserve.config import SchedulerConfig, Scheduling
from momaserve.core.admission import FirstCome, RouterAware
from momaserve.core.entries import EntryShape
from momaserve.core.forecast import Forecast
from momaserve.core.kv_cache import KVCache
from momaserve.core.pace import Pace
from momaserve.core.plan import OWN, StepPlan
from momaserve.core.room import can_grow, check_fits, num_blocks_to_start
from momaserve.core.step import StepDraft, num_missing, share_budget, split
from momaserve.core.waiting import WaitingQueue, age
from momaserve.errors import RequestError
from momaserve.request import Request, RequestStatus

MAX_PREEMPTIONS = 3
"""A request that was preempted so often starts again only with room for its whole course."""

BACKLOG_PER_SLOT = 2
"""Requests that wait for each that may run, before one may pass another (docs/scheduling.md)."""


class Scheduler:
    """Moves each running request's `num_computed_tokens` towards its `num_tokens`, step by step.

    Owns the waiting queue, the running requests and, through `kv_cache`, every block. All calls
    come from one thread. Age is (priority, arrival): the oldest waiting request starts first, but
    for a bounded number that may pass it (`core.admission`), and the youngest running one is
    preempted when blocks run out, so the oldest always gets on, and each request is the oldest
    one day.

    A step may be planned while others are still in flight, for those requests whose next token
    does not depend on what is being sampled (`schedule(ahead)`); steps are settled in order.

    Invariants after every public call:
      * a request is in exactly one of waiting, running, or neither (finished);
      * a running request's blocks cover its first `num_computed_tokens` tokens;
      * a waiting or finished request holds no block;
      * no more sequences run than a step has tokens, so that each step moves all of them;
      * while there is work and no step is in flight, a step is not empty; but with depth routing
        one that is alone may have to begin again, `MAX_PREEMPTIONS` times at the most, since
        the entries of blocks that it shares take more room than its own.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool = True,
        entries: EntryShape | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        """
        Args:
            entries: what depth-routed layers keep; None where there are none.
            forecast: predicts what steps take. Without it requests start first come, first
                served, for nothing is known of their experts.
        """
        self.kv_cache = KVCache(
            num_blocks, block_size, prefix_caching=prefix_caching, entries=entries
        )
        self._config = config
        self._requests: dict[str, Request] = {}
        self._running: dict[str, Request] = {}
        """Oldest first whenever a step is planned."""
        self._is_sorted = True
        self._forecast = forecast
        self._admission: FirstCome | RouterAware = FirstCome()
        self._pace: Pace | None = None
        self._waiting = WaitingQueue(config)
        if config.scheduling is Scheduling.ROUTER_AWARE and forecast is not None:
            self._be_aware(forecast)
        self._num_sequences = 0
        self._num_arrived = 0
        self._in_flight: deque[list[Request]] = deque()

    @property
    def requests(self) -> Mapping[str, Request]:
        """Waiting and running requests by id: a live, read-only view."""
        return MappingProxyType(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of all waiting requests together, those preempted left out."""
        return self._waiting.num_tokens

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def _be_aware(self, forecast: Forecast) -> None:
        """Plans by predicted times, and by experts if modalities have their own."""
        config, meter = self._config, forecast.meter
        costs = forecast.cost_model.costs
        if len(costs.groups) > 1:
            self._admission = RouterAware(
                costs,
                meter,
                max_num_passes=config.num_passes_allowed,
                min_backlog=BACKLOG_PER_SLOT * config.max_num_requests,
            )
            self._waiting = WaitingQueue(config, lambda request: meter.phase(request.sequence))
        if config.step_time_target_ms is not None:
            self._pace = Pace(
                forecast.cost_model,
                meter,
                target_s=config.step_time_target_ms / 1000,
                block_size=self.kv_cache.block_size,
                max_num_tokens=config.max_num_step_tokens,
            )

    # --- arrival and end ---------------------------------------------------------------------

    def check_fits(self, request: Request) -> None:
        """Checks that a request could run if it were alone. Reads no state: safe on any thread.

        Raises:
            PromptError: its whole course does not fit into the cache, or a prompt that must be
                computed in one step does not fit into a step.
            RequestError: it has more sequences than may run.
        """
        check_fits(request, self._config, self.kv_cache)

    def check_submission(self, num_requests: int, num_tokens: int) -> None:
        """Raises RequestError when not even an empty queue takes it. Safe on any thread."""
        self._waiting.check_submission(num_requests, num_tokens)

    def add_all(self, requests: Sequence[Request]) -> None:
        """Queues the requests of one submission, all or none. Those with a leader follow it.

        Raises:
            PromptError, RequestError: a request that can never run, or whose id is in use.
            QueueFullError: the queue is at one of its limits.
        """
        for request in requests:
            self.check_fits(request)
            if request.request_id in self._requests:
                raise RequestError(
                    f"request id {request.request_id!r} is already in use", param="request_id"
                )
            assert request.status is RequestStatus.WAITING, request.status
            _check_goes_on(request)
        assert len({r.request_id for r in requests}) == len(requests), "requests share an id"
        self._waiting.check_room(len(requests), sum(r.num_prompt_tokens for r in requests))
        for request in requests:
            request.arrival_order = self._num_arrived
            self._num_arrived += 1
            self._requests[request.request_id] = request
            self._waiting.add(request)

    def abort(self, request_id: str, *, broken: bool = False) -> bool:
        """Ends a request in any state; False when there is no such request (any more).

        Its blocks are free at once. That is safe while a step that it is part of runs: steps
        run one after another, and whoever gets a block next writes to it in a later one.

        Args:
            broken: what it computed is wrong, and nobody may find it in the cache.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        if broken:
            for sequence in (request.sequence, *request.companions):
                self.kv_cache.forget(sequence)
        self._remove(request)
        return True

    def end_companions(self, request: Request) -> None:
        """Gives up the companions of a picture that is complete."""
        for companion in request.companions:
            self.kv_cache.release(companion)
        request.companions.clear()

    # --- steps -------------------------------------------------------------------------------

    def schedule(self, ahead: Collection[str] = ()) -> StepPlan:
        """Plans the next step, and starts requests in it; empty when nothing can be computed.

        Each plan that is not empty is settled by `update`. One that failed is settled so too,
        after the abort of all requests of it and of later ones in flight, and then the prefix
        cache is emptied (`kv_cache.forget_all`).

        Args:
            ahead: requests with a token that is still being sampled which may compute it
                nevertheless; the others of that kind are left out.
        """
        if not self._is_sorted:
            running = sorted(self._running.values(), key=age)
            self._running = {request.request_id: request for request in running}
            self._is_sorted = True
        missing = [
            (request, num_missing(request))
            for request in self._running.values()
            if not request.num_pending_tokens or request.request_id in ahead
        ]
        limit = budget = self._config.max_num_step_tokens
        if self._pace is not None:
            budget = self._pace.budget(missing, self._waiting.peek())
        step = StepDraft(budget, limit)
        shares = share_budget(missing, budget)
        for (request, num_missed), share in zip(missing, shares, strict=True):
            if request.status is not RequestStatus.RUNNING:
                continue  # preempted by an older one
            if share == 1 and not request.companions and self._take_slot(request, step):
                # Nearly all requests in nearly all steps: one more token into a block that is
                # there, and nothing else to ask.
                if num_missed == 1:
                    self._plan_sample(request, step)
                continue
            self._advance(request, share, step)
        # Only now: who starts is not preempted in the same step, and takes what nobody was given.
        self._start_followers(step)
        if not step.num_preemptions:
            self._start_waiting(step)
        plan = step.plan() if self._forecast is None else step.plan(*self._forecast.of(step))
        if plan.sequences:
            self._in_flight.append(list(step.requests))
        return plan

    def update(
        self,
        plan: StepPlan,
        sampled: Mapping[str, Sequence[int]],
        finished: Collection[str],
        entry_counts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Settles the oldest step in flight.

        Requests that were aborted since it was planned are passed over, in all arguments.

        Args:
            plan: the plan of that step.
            sampled: new tokens, sampled and forced, of the requests that `plan.samples`; they
                are appended to the requests' own sequences.
            finished: requests that end here.
            entry_counts: for each of `plan.sequences`, how many depth-routed layers took each of
                its tokens; None where there are no such layers, or when the step failed.
        """
        self.kv_cache.settle(len(plan.sequences), entry_counts)
        samples = frozenset(plan.samples)
        requests = self._requests
        for request in self._in_flight.popleft():
            name = request.request_id
            if requests.get(name) is not request:
                continue
            if name in samples:
                request.num_pending_tokens -= 1
                request.sequence.token_ids += sampled.get(name, ())
            else:
                assert not sampled.get(name), f"{name!r} did not sample"
            if name in finished:
                self._remove(request)
            else:
                _check_goes_on(request)

    def _take_slot(self, request: Request, step: StepDraft) -> bool:
        """Plans one token of a request in the block that is there; False if there is none."""
        sequence = request.sequence
        start = sequence.num_computed_tokens
        if not self.kv_cache.take_slot(sequence):
            return False
        step.add(request, OWN, start, 1)
        return True

    def _advance(self, request: Request, share: int, step: StepDraft) -> None:
        """Plans tokens of a running request; preempts others, or itself, for want of blocks."""
        if share > self.kv_cache.block_size:  # somebody else may compute the same prompt
            num_hits = self._take_hits(request)
            request.num_cached_tokens += num_hits
            step.num_cache_hits += num_hits
        counts = split(request, share)
        if counts is None:
            return
        while not can_grow(request, counts, self.kv_cache):
            victim = self._victim(request)
            self._preempt(victim)
            step.num_preemptions += 1
            if victim is request:
                return
        self._plan(request, counts, step)

    def _start_waiting(self, step: StepDraft) -> None:
        """Starts waiting requests, one by one, while there are slots, tokens and blocks."""
        while step.budget > 0:
            request = self._admission.next(self._waiting, self._running.values())
            if request is None or request.num_pending_tokens:
                return  # nobody waits, or one that was preempted with a token in flight
            if self._num_sequences + request.num_sequences > self._max_sequences:
                return
            is_careful = request.num_preemptions >= MAX_PREEMPTIONS
            num_hits = self._take_hits(request)
            if not self._running and not self._has_room(request, is_careful):
                # Entries of shared blocks lie among others': they may take more room than its own.
                self._release(request)
                num_hits = 0
            counts = split(request, step.share_for(request))
            if counts is None or not self._has_room(request, is_careful):
                self._release(request)
                return
            self._start(request)
            request.num_cached_tokens += num_hits
            step.num_cache_hits += num_hits
            if not request.num_preemptions and self._reads_cache(request):
                step.num_cache_queries += request.num_prompt_tokens
            if is_careful:
                grown = self.kv_cache.reserve(request.sequence, request.max_num_tokens)
                assert grown is not None
                step.copies += grown
            self._plan(request, counts, step)
            self._start_followers(step)

    def _start_followers(self, step: StepDraft) -> None:
        """Starts the followers of requests that reached the end of their prompts."""
        for leader in step.leaders:
            for follower in self._waiting.take_followers(leader.request_id):
                self._fork(leader, follower, step)
        step.leaders.clear()

    def _has_room(self, request: Request, whole_course: bool) -> bool:
        """Whether a request can start: all its known tokens, and a block for each that runs.

        A request that just fits would be preempted as soon as another grows.
        """
        needed = num_blocks_to_start(request, self.kv_cache, whole_course=whole_course)
        if self._running:
            needed += self._num_sequences
        return needed <= self.kv_cache.num_free_blocks

    def _plan(self, request: Request, counts: Sequence[int], step: StepDraft) -> None:
        """Grows a request by `counts` and puts it into the step; blocks are known to suffice."""
        sequences = (request.sequence, *request.companions)
        for index, (sequence, count) in enumerate(zip(sequences, counts, strict=True), start=OWN):
            start = sequence.num_computed_tokens
            if count:
                copies = self.kv_cache.grow(sequence, start + count)
                assert copies is not None, "blocks were counted wrongly"
                step.copies += copies
                self.kv_cache.advance(sequence, count)
                step.add(request, index, start, count)
        if num_missing(request) == 0:
            self._plan_sample(request, step)

    def _plan_sample(self, request: Request, step: StepDraft) -> None:
        step.requests[request] = None  # a follower may have nothing else in the step
        step.samples.append(request.request_id)
        request.num_pending_tokens += 1
        if self._waiting.has_followers(request.request_id):
            step.leaders.append(request)

    def _fork(self, leader: Request, follower: Request, step: StepDraft) -> None:
        """Starts a follower from the end of its leader's prompt, or queues it on its own."""
        num_companion_tokens = sum(c.num_tokens for c in follower.companions)
        blocks_for = self.kv_cache.blocks_for
        num_companion_blocks = sum(blocks_for(c.num_tokens) for c in follower.companions)
        if (
            not self._admission.may_fork(follower, self._waiting)
            or self._num_sequences + follower.num_sequences > self._max_sequences
            or num_companion_tokens > step.budget
            or num_companion_blocks > self.kv_cache.num_free_blocks
        ):
            self._waiting.release(follower)
            return
        self._start(follower)
        self.kv_cache.fork(leader.sequence, follower.sequence)
        step.forks[follower.request_id] = leader.request_id
        self._plan(follower, [0, *(c.num_tokens for c in follower.companions)], step)

    # --- blocks ------------------------------------------------------------------------------

    def _take_hits(self, request: Request) -> int:
        """Spares a request what is computed already; one whose prompt is scored needs it all.

        Returns:
            Prompt tokens that it need not compute, unless it was preempted and had them once.
        """
        if not self._reads_cache(request):
            return 0
        start = request.sequence.num_computed_tokens
        stop = start + self.kv_cache.take_hits(request.sequence)
        for companion in request.companions:
            self.kv_cache.take_hits(companion)
        return (
            0 if request.num_preemptions else max(0, min(stop, request.num_prompt_tokens) - start)
        )

    def _reads_cache(self, request: Request) -> bool:
        is_shared = self.kv_cache.prefix_caching and request.sequence.root_key is not None
        return is_shared and request.params.prompt_logprobs is None

    def _victim(self, request: Request) -> Request:
        """Who gives up blocks for a running request: the youngest one after it, else itself.

        Those that were preempted too often are spared, but not by the oldest of all, which must
        get on whatever happens.
        """
        candidates = list(self._running.values())
        younger = candidates[candidates.index(request) + 1 :]
        for candidate in reversed(younger):
            if candidate.num_preemptions < MAX_PREEMPTIONS:
                return candidate
        if younger and candidates[0] is request:
            return younger[-1]
        return request

    def _preempt(self, request: Request) -> None:
        """Sends a running request back to the queue; what it computed is computed again."""
        self._stop(request)
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self._waiting.put_back(request)

    def _release(self, request: Request) -> None:
        for sequence in (request.sequence, *request.companions):
            self.kv_cache.release(sequence)

    # --- states ------------------------------------------------------------------------------

    @property
    def _max_sequences(self) -> int:
        return min(self._config.max_num_requests, self._config.max_num_step_tokens)

    def _start(self, request: Request) -> None:
        self._waiting.remove(request)
        self._waiting.count_passes(request)
        youngest = next(reversed(self._running.values()), None)
        if youngest is not None and age(request) < age(youngest):
            self._is_sorted = False
        self._running[request.request_id] = request
        self._num_sequences += request.num_sequences
        request.status = RequestStatus.RUNNING

    def _stop(self, request: Request) -> None:
        del self._running[request.request_id]
        self._num_sequences -= request.num_sequences
        self._release(request)

    def _remove(self, request: Request) -> None:
        del self._requests[request.request_id]
        if request.status is RequestStatus.WAITING:
            self._waiting.remove(request)
        else:
            self._stop(request)
        self._waiting.replace_leader(request.request_id)
        request.status = RequestStatus.FINISHED

    def check(self) -> None:
        """Recounts everything the class promises, from scratch."""
        waiting = {n: r for n, r in self._requests.items() if n not in self._running}
        assert all(name in self._waiting for name in waiting)
        assert len(self._waiting) == len(waiting)
        assert self._running.keys() <= self._requests.keys()
        assert all(r.status is RequestStatus.WAITING for r in waiting.values())
        assert all(r.status is RequestStatus.RUNNING for r in self._running.values())
        num_sequences = sum(r.num_sequences for r in self._running.values())
        assert self._num_sequences == num_sequences <= self._max_sequences
        self._waiting.check()
        for request in self._requests.values():
            assert len(request.companions) in (0, request.num_companions)
            if not self._in_flight:
                assert not request.num_pending_tokens
                _check_goes_on(request)
            if request.status is RequestStatus.WAITING:
                for sequence in (request.sequence, *request.companions):
                    assert not sequence.blocks and not sequence.num_computed_tokens
                    assert not sequence.entry_blocks and not sequence.max_num_entries
        self.kv_cache.check(
            sequence
            for request in self._running.values()
            for sequence in (request.sequence, *request.companions)
        )


def _check_goes_on(request: Request) -> None:
    """Checks that there is something left to compute, and room for it."""
    sequence = request.sequence
    num_tokens = len(sequence.token_ids)
    assert sequence.num_computed_tokens < num_tokens + request.num_pending_tokens, (
        f"{request.request_id!r}: all of {num_tokens} tokens are computed"
    )
    assert num_tokens <= request.max_num_tokens, (
        f"{request.request_id!r}: {num_tokens} tokens exceed {request.max_num_tokens}"
    )
