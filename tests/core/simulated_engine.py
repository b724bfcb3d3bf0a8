"""Plays engine and device around a scheduler: pictures, steps in flight, failures, all checked.

Every rule that holds for any load is asserted here; who calls what, and when, is the caller's
(`test_oracle.py` by dice, `test_properties.py` by hypothesis).
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import pytest

from momaserve.config import RoutingPolicy, SchedulerConfig, Scheduling
from momaserve.core.block_key import root_key
from momaserve.core.entries import EntryShape
from momaserve.core.plan import OWN, StepPlan
from momaserve.core.scheduler import MAX_PREEMPTIONS, Scheduler
from momaserve.errors import PromptError, QueueFullError, RequestError
from momaserve.request import Request, RequestStatus, TokenSequence
from momaserve.sampling import SamplingParams
from tests.core.factory import make_forecast
from tests.core.slow_model import (
    BEGIN,
    CODES,
    END,
    EOS,
    Course,
    KVMemory,
    Submission,
    companion_prompt,
    whole_answer,
)


@dataclass(frozen=True)
class Limits:
    num_blocks: int
    block_size: int
    max_num_requests: int
    max_num_step_tokens: int
    max_queued_requests: int = 12
    max_queued_tokens: int = 120
    prefix_caching: bool = True
    scheduling: Scheduling = Scheduling.FCFS
    max_num_passes: int | None = None
    """None is what it is by default."""
    step_time_target_ms: float | None = None
    num_routed: int = 0
    """Depth-routed layers."""
    entries_per_block: int = 1

    def make_scheduler(self) -> Scheduler:
        config = SchedulerConfig(
            max_num_requests=self.max_num_requests,
            max_num_step_tokens=self.max_num_step_tokens,
            max_queued_requests=self.max_queued_requests,
            max_queued_tokens=self.max_queued_tokens,
            scheduling=self.scheduling,
            max_num_passes=self.max_num_passes,
            step_time_target_ms=self.step_time_target_ms,
        )
        return Scheduler(
            config,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            prefix_caching=self.prefix_caching,
            entries=(
                EntryShape(self.num_routed, self.entries_per_block) if self.num_routed else None
            ),
            forecast=make_forecast(),
        )

    @property
    def most_passes(self) -> int:
        """Younger requests that may start before one."""
        if self.scheduling is Scheduling.FCFS:
            return 0
        default = 4 * self.max_num_requests
        return default if self.max_num_passes is None else self.max_num_passes


@dataclass(eq=False)
class Player:
    """A request, its answer on the device, and what is known of it on the host."""

    request: Request
    course: Course
    number: int
    index: int
    end: int = 0
    """Tokens that its last row, or its leader's, had reached."""


@dataclass(eq=False)
class Flight:
    """A step in flight: what it sampled comes to light when it is settled."""

    plan: StepPlan
    sampled: list[tuple[Player, list[int]]]
    written: list[tuple[int, int]]
    entry_counts: list[list[int]]


class SimulatedEngine:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.scheduler = limits.make_scheduler()
        self.seen: Counter[str] = Counter()
        """How often each thing happened, so that a test may ask whether it did."""
        self._memory = KVMemory(
            limits.num_blocks,
            limits.block_size,
            num_routed=limits.num_routed,
            entries_per_block=limits.entries_per_block,
        )
        self._players: dict[str, Player] = {}
        self._flights: deque[Flight] = deque()
        self._num_submissions = 0
        self._num_passes: Counter[Request] = Counter()
        """Of each waiting request: younger ones that started before it."""

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    @property
    def names(self) -> list[str]:
        """Requests that are waiting or running, oldest arrival first."""
        return list(self._players)

    # --- arrival and end ---------------------------------------------------------------------

    def submit(self, asked: Submission, names: list[str] | None = None) -> bool:
        """Queues a submission, or sees it refused for the right reason."""
        number = self._num_submissions
        self._num_submissions += 1
        names = names or [f"{number}-{index}" for index in range(asked.n)]
        requests = [_make_request(asked, name, names[0]) for name in names]
        error = self._refusal(asked, len(names))
        if error is not None:
            with pytest.raises(error):
                self.scheduler.add_all(requests)
            self.seen[f"refused: {error.__name__}"] += 1
            self.scheduler.check()
            return False
        self.scheduler.add_all(requests)
        for index, request in enumerate(requests):
            player = Player(request, Course(asked, number, index), number, index)
            self._players[request.request_id] = player
        self.scheduler.check()
        self.seen["arrived"] += len(requests)
        return True

    def _refusal(self, asked: Submission, count: int) -> type[Exception] | None:
        limits = self.limits
        needed = self._blocks(len(asked.prompt) + asked.max_tokens)
        needed += asked.num_companions * self._blocks(2 + asked.num_codes)
        if needed > limits.num_blocks:
            return PromptError
        whole = len(asked.prompt)
        if asked.prompt[-1] == BEGIN and not asked.opening:
            whole += 2 * asked.num_companions
        if asked.prompt_routing == "expert_choice" and whole > limits.max_num_step_tokens:
            return PromptError
        if 1 + asked.num_companions > min(limits.max_num_requests, limits.max_num_step_tokens):
            return RequestError
        num_tokens = count * len(asked.prompt)
        if count > limits.max_queued_requests or num_tokens > limits.max_queued_tokens:
            return RequestError
        queued = [
            request
            for request in self.scheduler.requests.values()
            if request.status is RequestStatus.WAITING and not request.num_preemptions
        ]
        num_tokens += sum(request.num_prompt_tokens for request in queued)
        if (
            len(queued) + count > limits.max_queued_requests
            or num_tokens > limits.max_queued_tokens
        ):
            return QueueFullError
        return None

    def _blocks(self, num_tokens: int) -> int:
        """Blocks of one sequence, if every layer takes all of its tokens."""
        limits = self.limits
        num_entries = num_tokens * limits.num_routed
        return -(-num_tokens // limits.block_size) - (-num_entries // limits.entries_per_block)

    def abort(self, name: str) -> None:
        player = self._players.pop(name)
        self.seen[f"aborted: {player.request.status}"] += 1
        if any(name in {s.request_id for s in f.plan.sequences} for f in self._flights):
            self.seen["aborted in flight"] += 1
        assert self.scheduler.abort(name)
        assert not self.scheduler.abort(name)
        self.scheduler.check()

    # --- steps -------------------------------------------------------------------------------

    def step(self) -> bool:
        """Plans a step, ahead of those in flight, and launches it; False when it is empty."""
        scheduler = self.scheduler
        ahead = {name for name, player in self._players.items() if _may_run_ahead(player)}
        running = [r for r in scheduler.requests.values() if r.status is RequestStatus.RUNNING]
        plan = scheduler.schedule(ahead)
        scheduler.check()
        self._check_ages(running, ahead, plan)
        self._check_offers()
        if not plan.sequences:
            is_idle = not self._players or plan.num_preemptions and self.limits.num_routed
            assert self._flights or is_idle, "there is work, but the step is empty"
            return False
        self._launch(plan)
        return True

    def _check_ages(self, running: list[Request], ahead: set[str], plan: StepPlan) -> None:
        rows = {row.request_id for row in plan.sequences}
        oldest = min(running, key=_age, default=None)
        if oldest and (not oldest.num_pending_tokens or oldest.request_id in ahead):
            if self.limits.num_routed and oldest.status is RequestStatus.WAITING:
                # Shared blocks took more room than its own would: a bounded number of times.
                assert oldest.num_preemptions <= MAX_PREEMPTIONS
                self.seen["began again"] += 1
            else:
                assert oldest.request_id in rows, "the oldest stands still"
        requests = self.scheduler.requests
        assert all(requests[name].status is RequestStatus.RUNNING for name in rows)
        forked = [requests[name] for name in plan.forks]
        victims = [r for r in [*running, *forked] if r.status is RequestStatus.WAITING]
        assert len(victims) == plan.num_preemptions
        self.seen["preempted"] += plan.num_preemptions
        self.seen["preempted in flight"] += sum(1 for r in victims if r.num_pending_tokens)
        going = [r for r in requests.values() if r.status is RequestStatus.RUNNING]
        for victim in victims:
            for request in going:
                assert _age(request) < _age(victim) or request.num_preemptions >= MAX_PREEMPTIONS, (
                    f"{victim.request_id} gave way to the younger {request.request_id}"
                )
        started = [r for r in going if r not in running]
        for request in requests.values():
            if request.status is RequestStatus.WAITING and request.leader_id is None:
                self._check_passes(request, started)

    def _check_passes(self, request: Request, passing: list[Request]) -> None:
        """A waiting request saw others start before it, in one step."""
        for other in passing:
            if _age(other) < _age(request):
                continue
            what = f"{other.request_id} passed {request.request_id}"
            assert request.params.priority == other.params.priority, what
            assert not request.num_preemptions and not other.num_preemptions, what
            assert _is_drawing(request) != _is_drawing(other), what
            self._num_passes[request] += 1
            self.seen["passed"] += 1
        assert self._num_passes[request] <= self.limits.most_passes, "passed too often"

    def _check_offers(self) -> None:
        """No block is offered, or counted as offered, before it is full of known tokens."""
        for request in self.scheduler.requests.values():
            for sequence in (request.sequence, *request.companions):
                num_known = min(sequence.num_computed_tokens, sequence.num_tokens)
                assert sequence.num_committed_blocks <= num_known // self.limits.block_size

    def _launch(self, plan: StepPlan) -> None:
        """Runs the step on the simulated device, which knows all sampled tokens."""
        num_tokens = sum(row.num_new_tokens for row in plan.sequences)
        assert num_tokens == plan.num_tokens <= self.limits.max_num_step_tokens
        rows = []
        ends: dict[tuple[str, int], int] = {}
        for row in plan.sequences:
            player = self._players[row.request_id]
            course = player.course
            ghosts = (course.main, *course.companions)
            assert row.num_new_tokens >= 1
            rows.append((row, ghosts[row.companion + 1]))
            ends[row.request_id, row.companion] = row.start + row.num_new_tokens
            assert ends[row.request_id, row.companion] <= len(rows[-1][1].identities)
            if row.companion == OWN:
                if player.request.params.prompt_logprobs is not None:
                    assert row.start in (0, player.end), "a prompt that is scored has a gap"
                player.end = row.start + row.num_new_tokens
            if course.submission.prompt_routing == "expert_choice" and row.companion == OWN:
                assert row.start >= course.main.num_prompt or (
                    row.start == 0 and row.num_new_tokens >= course.main.num_prompt
                ), "a prompt that must be whole is split"
        assert len(ends) == len(plan.sequences), "a sequence has two rows"
        written, entry_counts = self._memory.run(plan, rows)
        self.seen["entries"] += sum(map(sum, entry_counts))
        self._note(plan)

        sampled: list[tuple[Player, list[int]]] = []
        for name in plan.samples:
            player = self._players[name]
            lead = plan.forks.get(name, name)
            player.end = self._players[lead].end
            assert self._players[lead].course.main.identities == player.course.main.identities
            both = [player.course.main, *player.course.companions]
            for index, ghost in enumerate(both, start=OWN):
                row_name = lead if index == OWN else name
                assert ends[row_name, index] == len(ghost.identities), "not all last tokens"
            last = [ghost.identities[-1] for ghost in both]
            sampled.append((player, player.course.next_tokens(last)))
        for name in {row.request_id for row in plan.sequences} - set(plan.samples):
            course = self._players[name].course
            for index, ghost in enumerate((course.main, *course.companions), start=OWN):
                if ends.get((name, index)) == len(ghost.identities):
                    raise AssertionError(f"{name} computes a last token and does not sample")
        for player, token_ids in sampled:
            player.course.append(token_ids)
        self._flights.append(Flight(plan, sampled, written, entry_counts))

    def _note(self, plan: StepPlan) -> None:
        self.seen["steps"] += 1
        self.seen["steps ahead"] += bool(self._flights)
        self.seen["copies"] += len(plan.copies)
        self.seen["forks"] += len(plan.forks)
        self.seen["hits"] += plan.num_cache_hits
        self.seen["companion rows"] += sum(1 for row in plan.sequences if row.companion != OWN)

    def settle(self) -> None:
        """Settles the oldest step in flight: tokens become known, pictures begin and end."""
        flight = self._flights.popleft()
        tokens: dict[str, list[int]] = {}
        finished: set[str] = set()
        for player, token_ids in flight.sampled:
            request = player.request
            if self._players.get(request.request_id) is not player:
                continue  # aborted, or finished by the step before
            tokens[request.request_id] = token_ids
            end = request.num_output_tokens + len(token_ids)
            if end >= player.course.submission.max_tokens or EOS in token_ids:
                finished.add(request.request_id)
            for token_id in token_ids:
                if token_id in CODES:
                    for companion in request.companions:
                        companion.token_ids.append(token_id)
        self.scheduler.update(flight.plan, tokens, finished, flight.entry_counts)
        for name, token_ids in tokens.items():
            player = self._players[name]
            if name in finished:
                self._finish(player)
            elif token_ids[-1] == BEGIN:
                player.request.companions = _companions(player.course.submission)
            elif token_ids[-1] == END:
                self.scheduler.end_companions(player.request)
        self.scheduler.check()

    def _finish(self, player: Player) -> None:
        del self._players[player.request.request_id]
        asked = player.course.submission
        expected = whole_answer(asked, player.number, player.index)
        assert list(player.request.output_token_ids) == expected
        assert player.request.status is RequestStatus.FINISHED
        self.seen["finished"] += 1
        self.seen["finished after preemptions"] += bool(player.request.num_preemptions)

    def fail(self) -> None:
        """All steps in flight fail, and what they wrote is worth nothing."""
        for flight in self._flights:
            self._memory.spoil(flight.written)
            for name in {*flight.plan.samples, *(s.request_id for s in flight.plan.sequences)}:
                self.scheduler.abort(name, broken=True)
                self._players.pop(name, None)
        while self._flights:
            self.scheduler.update(self._flights.popleft().plan, {}, ())
        self.scheduler.kv_cache.forget_all()
        self.scheduler.check()
        self.seen["failed steps"] += 1

    def drain(self, max_num_steps: int) -> None:
        """Runs until nothing is left."""
        while self._players or self._flights:
            if (len(self._flights) == 2 or not self.step()) and self._flights:
                self.settle()
            max_num_steps -= 1
            assert max_num_steps > 0, "somebody starves"
        cache = self.scheduler.kv_cache
        assert not self.scheduler.has_work
        assert cache.num_free_blocks == cache.num_blocks
        assert self.scheduler.num_waiting == self.scheduler.num_waiting_tokens == 0


def _is_drawing(request: Request) -> bool:
    return request.sequence.token_ids[-1] in (BEGIN, *CODES)


def _may_run_ahead(player: Player) -> bool:
    """Whether the token in flight can be computed before it is known what it is.

    Not where it may bring a forced token along, or begin or end a picture.
    """
    course, asked = player.course, player.course.submission
    if asked.has_bursts or course.is_full:
        return False
    if not asked.num_codes:
        return True
    marks = [t for t in player.request.sequence.token_ids if t in (BEGIN, END)]
    return bool(marks) and marks[-1] == BEGIN and course.codes_left > 0


def _make_request(asked: Submission, name: str, leader: str) -> Request:
    prompt_routing = RoutingPolicy(asked.prompt_routing)
    is_whole = prompt_routing is RoutingPolicy.EXPERT_CHOICE
    return Request(
        request_id=name,
        sequence=TokenSequence(
            token_ids=[*asked.prompt, *asked.opening],
            num_prompt_tokens=len(asked.prompt),
            routing=RoutingPolicy(asked.routing),
            prompt_routing=prompt_routing,
            root_key=None if is_whole else root_key(asked.salt),
        ),
        params=SamplingParams(
            max_tokens=asked.max_tokens,
            priority=asked.priority,
            prompt_logprobs=asked.prompt_logprobs,
        ),
        seed=asked.seed,
        max_num_tokens=len(asked.prompt) + asked.max_tokens,
        max_num_companion_tokens=2 + asked.num_codes,
        num_companions=asked.num_companions,
        companions=_companions(asked) if asked.starts_in_picture else [],
        leader_id=None if name == leader else leader,
    )


def _companions(asked: Submission) -> list[TokenSequence]:
    return [
        TokenSequence(
            token_ids=list(companion_prompt(index)),
            num_prompt_tokens=2,
            routing=RoutingPolicy.CAUSAL,
            prompt_routing=RoutingPolicy.CAUSAL,
            root_key=root_key(asked.salt),
        )
        for index in range(asked.num_companions)
    ]


def _age(request: Request) -> tuple[int, int]:
    return request.params.priority, request.arrival_order
