"""Chooses what each step computes. Knows no tensor, no device, no socket and no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from momaserve.config import RoutingPolicy, SchedulerConfig
from momaserve.core.kv_cache import KVCache
from momaserve.core.plan import PlannedRequest, StepPlan
from momaserve.errors import PromptError, QueueFullError, RequestError
from momaserve.request import Request, RequestStatus

RETRY_AFTER_S = 1
"""What a refused client is told to wait: a running request may end with any step."""


class Scheduler:
    """Moves each running request's `num_computed_tokens` towards its `num_tokens`, step by step.

    Owns the waiting queue, the running requests and, through `kv_cache`, every block. All calls
    come from one thread. Waiting requests are admitted first come, first served; one that does
    not fit yet lets nobody pass, so that none starves.

    Invariants after every public call:
      * a request is in exactly one of waiting, running, or neither (finished);
      * a running request's blocks cover its first `num_computed_tokens` tokens;
      * a waiting or finished request holds no block;
      * no more requests run than a step has tokens, so that each step moves all of them;
      * while there is work, a step is not empty.
    """

    def __init__(self, config: SchedulerConfig, *, num_blocks: int, block_size: int) -> None:
        self.kv_cache = KVCache(num_blocks, block_size)
        self._config = config
        self._requests: dict[str, Request] = {}
        self._running: dict[str, Request] = {}
        # Ordered dict: O(1) both at the head and for an abort in the middle.
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._num_waiting_tokens = 0

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
        """Prompt tokens of all waiting requests together."""
        return self._num_waiting_tokens

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def check_fits(
        self, num_tokens: int, prompt_must_be_whole: bool, num_prompt_tokens: int
    ) -> None:
        """Checks that a request could run if it were alone. Reads no state: safe on any thread.

        Args:
            num_tokens: most tokens of prompt and output together.
            prompt_must_be_whole: whether one step must compute the whole prompt.
            num_prompt_tokens: tokens of the prompt.

        Raises:
            PromptError: it could never run; the message names the numbers.
        """
        if num_prompt_tokens < 1:
            raise PromptError("the prompt must have at least 1 token, got 0")
        cache = self.kv_cache
        num_blocks = cache.blocks_for(num_tokens)
        if num_blocks > cache.num_blocks:
            raise PromptError(
                f"{num_tokens} tokens (prompt and max_tokens) need {num_blocks} KV blocks of "
                f"{cache.block_size} tokens, but the KV cache has {cache.num_blocks}"
            )
        limit = self._config.max_num_step_tokens
        if prompt_must_be_whole and num_prompt_tokens > limit:
            raise PromptError(
                f"prompt_routing {RoutingPolicy.EXPERT_CHOICE} computes the prompt in one step "
                f"of at most {limit} tokens (max_num_step_tokens), got {num_prompt_tokens}"
            )

    def check_submission(self, num_requests: int, num_tokens: int) -> None:
        """Checks that an empty queue would take a submission. Reads no state: safe on any thread.

        Args:
            num_requests: requests that arrive together (n counts n).
            num_tokens: prompt tokens of all of them.

        Raises:
            RequestError: no waiting would help; the message names value and limit.
        """
        config = self._config
        for unit, limit, num_added in (
            ("requests", config.max_queued_requests, num_requests),
            ("tokens", config.max_queued_tokens, num_tokens),
        ):
            if num_added > limit:
                raise RequestError(
                    f"the request brings {num_added} {unit} (n counts n) to a queue that never "
                    f"holds more than {limit} (max_queued_{unit})"
                )

    def add(self, request: Request) -> None:
        """Queues one request; raises as `add_all` does."""
        self.add_all([request])

    def add_all(self, requests: Sequence[Request]) -> None:
        """Queues new requests in this order: all of them, or none when it raises.

        Raises:
            PromptError: one of them could never run.
            RequestError: an id is in use, or they exceed even an empty queue.
            QueueFullError: the queue has no room for them now.
        """
        ids = {request.request_id for request in requests}
        assert len(ids) == len(requests), "two requests of one call share an id"
        for request in requests:
            self._check_new(request)
        num_tokens = sum(request.num_prompt_tokens for request in requests)
        self._check_room(len(requests), num_tokens)
        for request in requests:
            self._requests[request.request_id] = request
            self._waiting[request.request_id] = request
        self._num_waiting_tokens += num_tokens

    def abort(self, request_id: str) -> bool:
        """Ends a request in any state; False when there is no such request (any more).

        Its blocks are free at once. That is safe while the step it is part of still runs: no
        other request is given them before the next `schedule`, and steps run one after another.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._remove(request)
        return True

    def schedule(self) -> StepPlan:
        """Plans the next step, and admits requests to it; empty only when there is no work.

        `update` with this plan (or the abort of all its requests, when the step failed) comes
        before the next `schedule`.
        """
        budget = self._config.max_num_step_tokens
        planned: list[PlannedRequest] = []
        # Fewest missing tokens first: decoding is not slowed by a long prompt, which gets what
        # is left. One token is kept for each request still to come, so that all make progress.
        running = sorted(self._running.values(), key=_num_missing_tokens)
        for index, request in enumerate(running, start=1):
            num_kept = len(running) - index
            num_new_tokens = _fit(request, budget - num_kept)
            budget -= num_new_tokens
            planned.append(self._plan(request, num_new_tokens))
        while self._waiting and self.num_running < self._config.max_num_requests:
            request = next(iter(self._waiting.values()))
            num_new_tokens = _fit(request, budget)
            if num_new_tokens == 0 or not self.kv_cache.can_admit(request.max_num_tokens):
                break
            self._admit(request)
            budget -= num_new_tokens
            planned.append(self._plan(request, num_new_tokens))
        return StepPlan(requests=tuple(planned))

    def update(
        self, plan: StepPlan, sampled: Mapping[str, Sequence[int]], finished: Collection[str]
    ) -> None:
        """Settles a step that has run.

        Requests that were aborted since it was planned are passed over, in all three arguments.

        Args:
            plan: the plan of the last `schedule`.
            sampled: new tokens, sampled and forced, of the requests whose plan `samples`.
            finished: requests that end here. Every other one that sampled has a new token.
        """
        ended = frozenset(finished)
        for planned in plan.requests:
            # An aborted id that was added again is waiting, so it is not taken for the old one.
            request = self._running.get(planned.request_id)
            if request is None:
                continue
            request.num_computed_tokens += planned.num_new_tokens
            token_ids = sampled.get(planned.request_id, ())
            assert planned.samples or not token_ids, f"{planned.request_id!r} did not sample"
            request.output_token_ids += token_ids
            if planned.request_id in ended:
                self._remove(request)
            else:
                _check_goes_on(request)

    def check(self) -> None:
        """Recounts everything the class promises, from scratch."""
        assert self._waiting.keys().isdisjoint(self._running.keys())
        assert {**self._waiting, **self._running} == self._requests
        assert all(r.status is RequestStatus.WAITING for r in self._waiting.values())
        assert all(r.status is RequestStatus.RUNNING for r in self._running.values())
        num_tokens = sum(r.num_prompt_tokens for r in self._waiting.values())
        assert self._num_waiting_tokens == num_tokens, (self._num_waiting_tokens, num_tokens)
        config = self._config
        assert self.num_running <= min(config.max_num_requests, config.max_num_step_tokens)
        assert self.kv_cache.request_ids == self._running.keys()
        for request in self._running.values():
            num_blocks = len(self.kv_cache.block_ids(request.request_id))
            assert num_blocks * self.kv_cache.block_size >= request.num_computed_tokens
            _check_goes_on(request)
        self.kv_cache.check()

    def _check_new(self, request: Request) -> None:
        is_whole = _prompt_must_be_whole(request)
        self.check_fits(request.max_num_tokens, is_whole, request.num_prompt_tokens)
        if request.request_id in self._requests:
            raise RequestError(
                f"request id {request.request_id!r} is already in use", param="request_id"
            )
        assert request.status is RequestStatus.WAITING, request.status
        _check_goes_on(request)

    def _check_room(self, num_requests: int, num_tokens: int) -> None:
        # First what no waiting can cure, so that no client retries for ever.
        self.check_submission(num_requests, num_tokens)
        config = self._config
        for unit, limit, num_queued, num_added in (
            ("requests", config.max_queued_requests, self.num_waiting, num_requests),
            ("tokens", config.max_queued_tokens, self.num_waiting_tokens, num_tokens),
        ):
            if num_queued + num_added > limit:
                raise QueueFullError(
                    f"the queue holds {num_queued} {unit}; {num_added} more would exceed its "
                    f"limit of {limit} (max_queued_{unit})",
                    retry_after_s=RETRY_AFTER_S,
                )

    def _admit(self, request: Request) -> None:
        self._leave_queue(request)
        self._running[request.request_id] = request
        request.status = RequestStatus.RUNNING
        self.kv_cache.admit(request.request_id, request.max_num_tokens)

    def _plan(self, request: Request, num_new_tokens: int) -> PlannedRequest:
        assert num_new_tokens >= 1, f"{request.request_id!r} was planned before its last update"
        start = request.num_computed_tokens
        stop = start + num_new_tokens
        self.kv_cache.grow(request.request_id, stop)
        return PlannedRequest(
            request_id=request.request_id,
            start=start,
            num_new_tokens=num_new_tokens,
            block_ids=self.kv_cache.block_ids(request.request_id),
            samples=stop == request.num_tokens,
        )

    def _remove(self, request: Request) -> None:
        del self._requests[request.request_id]
        if request.status is RequestStatus.WAITING:
            self._leave_queue(request)
        else:
            del self._running[request.request_id]
            self.kv_cache.free(request.request_id)
        request.status = RequestStatus.FINISHED

    def _leave_queue(self, request: Request) -> None:
        del self._waiting[request.request_id]
        self._num_waiting_tokens -= request.num_prompt_tokens


def _num_missing_tokens(request: Request) -> int:
    return request.num_tokens - request.num_computed_tokens


def _prompt_must_be_whole(request: Request) -> bool:
    """Expert choice ranks a prompt's tokens against each other, so it needs them together."""
    return request.prompt_routing is RoutingPolicy.EXPERT_CHOICE


def _fit(request: Request, budget: int) -> int:
    """New tokens that a step with room for `budget` computes; 0 when it must wait."""
    num_new_tokens = min(_num_missing_tokens(request), budget)
    reached = request.num_computed_tokens + num_new_tokens
    if _prompt_must_be_whole(request) and reached < request.num_prompt_tokens:
        return 0
    return num_new_tokens


def _check_goes_on(request: Request) -> None:
    """Checks that there is something left to compute, and room for it."""
    assert request.num_computed_tokens < request.num_tokens <= request.max_num_tokens, (
        f"{request.request_id!r}: {request.num_computed_tokens} of {request.num_tokens} tokens "
        f"are computed, the limit is {request.max_num_tokens}"
    )
