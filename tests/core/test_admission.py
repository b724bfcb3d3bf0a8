"""Who starts next: what router-aware scheduling may do, what it must not, and what it brings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count

import pytest

from momaserve.config import Scheduling
from momaserve.core.scheduler import BACKLOG_PER_SLOT, Scheduler
from momaserve.modality import Modality
from momaserve.request import Request, RequestStatus
from tests.core.factory import (
    BEGIN_IMAGE,
    ONE_GROUP,
    make_forecast,
    make_request,
    make_scheduler,
    run_step,
    run_until,
)
from tests.core.slow_model import CODES

NUM_SLOTS = 2
MANY = BACKLOG_PER_SLOT * NUM_SLOTS
"""Waiting requests that make a backlog."""


def words(name: str, **fields: object) -> Request:
    return make_request(name, 3, **fields)  # type: ignore[arg-type]


def picture(name: str, **fields: object) -> Request:
    """One that decodes image tokens: `begin_image` is forced behind its prompt."""
    return make_request(name, 3, forced=[BEGIN_IMAGE], **fields)  # type: ignore[arg-type]


def aware(num_slots: int = NUM_SLOTS, *, max_num_passes: int | None = 2) -> Scheduler:
    return make_scheduler(
        max_num_requests=num_slots,
        max_num_passes=max_num_passes,
        max_num_step_tokens=64,
        num_blocks=256,
        forecast=make_forecast(),
    )


def step(scheduler: Scheduler, finished: Sequence[str] = ()) -> None:
    """A step in which pictures get codes, and everything else words."""
    tokens = {
        name: [CODES[0] if BEGIN_IMAGE in request.sequence.token_ids else 7]
        for name, request in scheduler.requests.items()
    }
    plan = scheduler.schedule()
    scheduler.check()
    scheduler.update(plan, {name: tokens[name] for name in plan.samples}, finished)
    scheduler.check()


def running(scheduler: Scheduler) -> str:
    names = (n for n, r in scheduler.requests.items() if r.status is RequestStatus.RUNNING)
    return "".join(sorted(names))


def two_run_words(*waiting: Request, max_num_passes: int | None = 2) -> Scheduler:
    """Two requests for words, a and b, take all slots; the others wait."""
    scheduler = aware(max_num_passes=max_num_passes)
    scheduler.add_all([words("a"), words("b"), *waiting])
    step(scheduler)
    assert running(scheduler) == "ab"
    return scheduler


def test_words_follow_words() -> None:
    scheduler = two_run_words(picture("p"), picture("q"), words("c"), words("d"))
    step(scheduler, finished="a")
    step(scheduler)
    assert running(scheduler) == "bc"
    assert scheduler.requests["p"].num_passes == 1
    assert scheduler.requests["q"].num_passes == 1
    assert scheduler.requests["d"].num_passes == 0


def test_the_oldest_is_next_where_both_add_as_much() -> None:
    scheduler = aware()
    scheduler.add_all([picture("p"), words("a"), words("b"), words("c"), words("d")])
    step(scheduler)
    assert running(scheduler) == "ap"  # nothing ran; then a picture did, but few waited


def test_nobody_passes_while_few_wait() -> None:
    scheduler = two_run_words(picture("p"), picture("q"), words("c"))
    assert scheduler.num_waiting == MANY - 1
    step(scheduler, finished="a")
    step(scheduler)
    assert running(scheduler) == "bp"


def test_whoever_was_passed_often_enough_is_next_and_keeps_the_turn() -> None:
    """p is passed by c and d. Then q and r go on, although e and f would add fewer bytes while
    most of the running requests are for words, and nobody has passed q yet."""
    scheduler = aware(4)
    scheduler.add_all([words(name) for name in "abxy"])
    for name in "pcdqefrghsijtkl":
        scheduler.add_all([(picture if name in "pqrst" else words)(name)])
    step(scheduler)
    started = []
    for ended in "abxycdp":
        before = set(running(scheduler))
        step(scheduler, finished=ended)
        step(scheduler)
        started += sorted(set(running(scheduler)) - before)
    assert started[:5] == ["c", "d", "p", "q", "r"]
    assert max(r.num_passes for r in scheduler.requests.values()) <= 2


def test_a_passed_request_is_not_passed_again_after_a_limit_of_none() -> None:
    scheduler = two_run_words(picture("p"), picture("q"), words("c"), words("d"), max_num_passes=0)
    step(scheduler, finished="a")
    step(scheduler)
    assert running(scheduler) == "bp"


def test_priority_comes_first() -> None:
    scheduler = two_run_words(picture("q"), words("c"), words("d"), words("e"))
    scheduler.add_all([picture("p", priority=-1)])
    step(scheduler, finished="a")
    step(scheduler)
    assert running(scheduler) == "bp"
    assert scheduler.requests["c"].num_passes == 0


def test_a_request_of_lower_priority_passes_nobody() -> None:
    scheduler = two_run_words(picture("p"), picture("q"), *(words(n, priority=1) for n in "cde"))
    step(scheduler, finished="a")
    step(scheduler)
    assert running(scheduler) == "bp"


def test_nobody_passes_one_that_was_preempted() -> None:
    """A picture and words share six blocks of four tokens; the picture gives way."""
    scheduler = make_scheduler(
        num_blocks=6,
        max_num_requests=2,
        max_num_step_tokens=64,
        max_num_passes=100,
        forecast=make_forecast(),
    )
    scheduler.add_all([words("a", max_tokens=20), picture("p", max_tokens=20)])
    step(scheduler)
    scheduler.add_all([words(name) for name in "cdefgh"])
    for _ in range(20):
        step(scheduler)
        if scheduler.requests["p"].num_preemptions:
            break
    assert running(scheduler) == "a"
    step(scheduler, finished="a")
    step(scheduler)
    assert running(scheduler)[-1] == "p"
    assert scheduler.requests["p"].num_passes == 0


def test_a_companion_starts_with_its_request_or_not_at_all() -> None:
    """One slot is free and the picture that is next needs two: it waits, and nobody passes."""
    scheduler = two_run_words(
        make_request("p", [7, 8, BEGIN_IMAGE], num_companions=1, in_picture=True),
        *(words(name) for name in "cde"),
        max_num_passes=0,
    )
    run_step(scheduler, finished="a")
    run_step(scheduler)
    assert running(scheduler) == "b"
    run_step(scheduler, finished="b")
    plan = run_step(scheduler)
    assert running(scheduler) == "p"
    assert [row.companion for row in plan.sequences] == [-1, 0]


def test_samples_pass_as_their_leader_did() -> None:
    """Two samples of one prompt start with the step that ends it, past a picture that waits."""
    scheduler = aware(4, max_num_passes=3)
    scheduler.add_all([words(n) for n in "abcd"])
    step(scheduler)
    scheduler.add_all([picture(n) for n in "pqrstuvw"])
    leader = words("e")
    follower = make_request("f", leader.prompt_token_ids, leader="e")
    scheduler.add_all([leader, follower])
    scheduler.add_all([words(n) for n in "gh"])
    step(scheduler, finished="ab")
    step(scheduler)
    assert running(scheduler) == "cdef"
    assert scheduler.requests["p"].num_passes == 2


def test_samples_do_not_pass_what_was_passed_often_enough() -> None:
    scheduler = aware(4, max_num_passes=1)
    scheduler.add_all([words(n) for n in "abcd"])
    step(scheduler)
    scheduler.add_all([picture(n) for n in "pqrstuvw"])
    leader = words("e")
    scheduler.add_all([leader, make_request("f", leader.prompt_token_ids, leader="e")])
    step(scheduler, finished="ab")
    step(scheduler)
    assert running(scheduler) == "cdep"
    assert scheduler.requests["q"].num_passes == 1


# --- properties -------------------------------------------------------------------------------


def play(
    scheduler: Scheduler, seed: int, *, num_requests: int = 120, limit: int = 10**9
) -> tuple[list[str], list[int]]:
    """Serves words and pictures that come faster than they can be served.

    Returns:
        The order of starts, and how many younger requests started before each.
    """
    dice = random.Random(seed)
    names = count()
    starts: list[str] = []
    while len(starts) < num_requests:
        for _ in range(dice.choice([0, 0, 1, 3])):
            make = dice.choice([words, picture])
            if scheduler.num_waiting < 60:
                name = str(next(names))
                scheduler.add_all([make(name, max_tokens=dice.randint(2, 9))])
        if not scheduler.has_work:
            continue
        waiting = {n for n, r in scheduler.requests.items() if r.status is RequestStatus.WAITING}
        is_over = [
            name
            for name, request in scheduler.requests.items()
            if request.num_tokens + 1 >= request.max_num_tokens
        ]
        step_of = scheduler.schedule()
        started = [
            name for name in waiting if scheduler.requests[name].status is RequestStatus.RUNNING
        ]
        starts += sorted(
            started, key=lambda name: [row.request_id for row in step_of.sequences].index(name)
        )
        sampled = {
            name: [CODES[0] if BEGIN_IMAGE in scheduler.requests[name].sequence.token_ids else 7]
            for name in step_of.samples
        }
        scheduler.update(step_of, sampled, set(is_over) & set(step_of.samples))
        scheduler.check()
        assert max((r.num_passes for r in scheduler.requests.values()), default=0) <= limit
    order = [int(name) for name in starts]
    passes = [sum(other > mine for other in order[:at]) for at, mine in enumerate(order)]
    return starts, passes


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("limit", [0, 1, 5, 16])
def test_nobody_is_passed_more_often_than_is_promised(seed: int, limit: int) -> None:
    """Counted from the order of starts alone, whatever the scheduler says of it."""
    _, passes = play(aware(3, max_num_passes=limit), seed, limit=limit)
    assert max(passes) <= limit
    assert (max(passes) > 0) == (limit > 0)


@pytest.mark.parametrize("seed", range(4))
def test_with_one_group_it_is_first_come_first_served(seed: int) -> None:
    plans = []
    for scheduling in Scheduling:
        scheduler = make_scheduler(
            max_num_requests=3,
            max_num_step_tokens=64,
            num_blocks=256,
            scheduling=scheduling,
            forecast=make_forecast(ONE_GROUP),
        )
        plans.append(play(scheduler, seed))
    assert plans[0] == plans[1]
    starts, _ = plans[0]
    assert starts == sorted(starts, key=int)


def test_with_two_groups_it_is_not() -> None:
    """What makes the test above able to fail."""
    starts, _ = play(aware(3, max_num_passes=None), 0)
    assert starts != sorted(starts, key=int)


def test_steps_touch_fewer_experts_with_a_backlog() -> None:
    """All wait from the start; the same answers need a fifth fewer bytes of experts."""
    total = {}
    for scheduling in Scheduling:
        scheduler = make_scheduler(
            max_num_requests=8,
            max_num_step_tokens=256,
            max_queued_requests=160,
            num_blocks=1024,
            scheduling=scheduling,
            forecast=(forecast := make_forecast()),
        )
        dice = random.Random(0)
        for number in range(160):
            make = dice.choice([words, picture])
            scheduler.add_all([make(str(number), max_tokens=16)])
        costs = forecast.cost_model.costs
        total[scheduling] = 0.0
        while scheduler.has_work:
            plan = scheduler.schedule()
            assert plan.load is not None
            total[scheduling] += sum(part.num_bytes for part in costs.parts(plan.load)[3:])
            requests = scheduler.requests
            sampled = {
                n: [CODES[0] if BEGIN_IMAGE in requests[n].sequence.token_ids else 7]
                for n in plan.samples
            }
            is_over = [
                n for n in plan.samples if requests[n].num_tokens + 1 >= requests[n].max_num_tokens
            ]
            scheduler.update(plan, sampled, is_over)
    assert total[Scheduling.ROUTER_AWARE] < 0.85 * total[Scheduling.FCFS]


def test_phases_of_the_requests_made_here() -> None:
    meter = make_forecast().meter
    assert meter.phase(words("a").sequence) is Modality.TEXT
    assert meter.phase(picture("p").sequence) is Modality.IMAGE


def test_all_of_a_backlog_is_served() -> None:
    scheduler = aware(2, max_num_passes=None)
    scheduler.add_all([picture("p"), *(words(str(n)) for n in range(30))])
    run_until(scheduler, lambda: scheduler.requests["p"].status is RequestStatus.RUNNING)
