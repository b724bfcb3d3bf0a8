"""Exact examples of preemption: who gives way, who comes back when, and what is lost."""

from __future__ import annotations

import pytest

from momaserve.core.plan import OWN
from momaserve.core.scheduler import MAX_PREEMPTIONS, Scheduler
from momaserve.errors import QueueFullError
from momaserve.request import Request
from tests.core.factory import (
    make_request,
    make_samples,
    make_scheduler,
    run_step,
    run_until,
    settle,
    spans,
)


def full_cache(names: str = "ab", *, num_blocks: int = 4, max_tokens: int = 6) -> Scheduler:
    """Requests that were started with one block of 2 tokens each, as full as `num_blocks`."""
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=2)
    for name in names:
        scheduler.add_all([make_request(name, 1, max_tokens=max_tokens)])
    run_step(scheduler)
    assert scheduler.num_running == len(names)
    return scheduler


def statuses(scheduler: Scheduler) -> dict[str, str]:
    return {name: str(request.status) for name, request in scheduler.requests.items()}


def preempt(scheduler: Scheduler, request: Request) -> None:
    run_until(scheduler, lambda: request.num_preemptions)


def test_the_youngest_gives_way() -> None:
    scheduler = full_cache("abc", num_blocks=6)
    requests = scheduler.requests
    plans = [run_step(scheduler) for _ in range(4)]
    assert [plan.num_preemptions for plan in plans] == [0, 0, 0, 1]
    assert plans[3].num_new_tokens == {"a": 1, "b": 1}
    assert statuses(scheduler) == {"a": "running", "b": "running", "c": "waiting"}
    c = requests["c"]
    assert c.num_preemptions == 1
    assert (c.sequence.blocks, c.sequence.num_computed_tokens) == ([], 0)
    assert c.num_output_tokens == 4  # what it said is kept


def test_nobody_starts_in_a_step_that_preempts() -> None:
    scheduler = full_cache("abc", num_blocks=6)
    for _ in range(3):
        run_step(scheduler)
    scheduler.add_all([make_request("d", 1, max_tokens=1, priority=-1)])
    plan = run_step(scheduler)
    assert plan.num_preemptions == 1
    assert plan.num_new_tokens == {"a": 1, "b": 1}


def test_a_preempted_request_resumes_with_all_that_it_said() -> None:
    scheduler = full_cache()
    b = scheduler.requests["b"]
    preempt(scheduler, b)
    num_tokens = b.num_tokens
    scheduler.abort("a")
    plan = run_step(scheduler)
    (row,) = spans(plan)
    assert row[:2] == ("b", OWN)
    assert row[2] + row[3] == num_tokens
    assert plan.samples == ("b",)
    assert (plan.num_cache_queries, b.num_cached_tokens) == (0, 0)


def test_what_a_preempted_request_had_computed_is_found_again() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=2)
    scheduler.add_all([make_request("a", 2, max_tokens=14), make_request("b", 6, max_tokens=10)])
    b = scheduler.requests["b"]
    preempt(scheduler, b)
    scheduler.abort("a")
    ((_, _, start, _),) = spans(run_step(scheduler))
    assert start > 0
    assert b.num_cached_tokens == 0  # it had computed that itself


def test_a_preempted_request_is_in_front_of_whoever_came_later() -> None:
    scheduler = full_cache()
    scheduler.add_all([make_request("c", 1, max_tokens=6)])
    b = scheduler.requests["b"]
    preempt(scheduler, b)
    assert scheduler.num_waiting == 2
    run_step(scheduler, finished=["a"])
    run_step(scheduler)
    assert statuses(scheduler)["b"] == "running"


def test_a_request_with_a_worse_priority_gives_way_whenever_it_came() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    scheduler.add_all([make_request("low", 1, max_tokens=6, priority=1)])
    scheduler.add_all([make_request("high", 1, max_tokens=6)])
    low, high = scheduler.requests.values()
    preempt(scheduler, low)
    assert high.num_preemptions == 0


def test_a_request_that_starts_late_with_a_better_priority_is_the_oldest() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=2)
    scheduler.add_all([make_request("low", 1, max_tokens=8, priority=1)])
    run_step(scheduler)
    scheduler.add_all([make_request("high", 1, max_tokens=8)])
    low, high = scheduler.requests.values()
    preempt(scheduler, low)
    assert high.num_preemptions == 0


def test_the_youngest_preempts_itself() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    scheduler.add_all([make_request("a", 2, max_tokens=6)])
    run_step(scheduler)
    run_step(scheduler)  # a holds 2 blocks, of which one token is free
    scheduler.add_all([make_request("b", 1, max_tokens=6)])
    run_step(scheduler)
    plan = run_step(scheduler)
    assert plan.num_new_tokens == {"a": 1, "b": 1}
    b = scheduler.requests["b"]
    preempt(scheduler, b)
    assert scheduler.requests["a"].num_preemptions == 0


def test_the_queue_s_caps_do_not_count_the_preempted() -> None:
    scheduler = make_scheduler(
        num_blocks=4, block_size=2, max_queued_requests=2, max_queued_tokens=4
    )
    scheduler.add_all([make_request("a", 1, max_tokens=6), make_request("b", 1, max_tokens=6)])
    b = scheduler.requests["b"]
    preempt(scheduler, b)
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (1, 0)
    scheduler.add_all([make_request("c", 2, max_tokens=2), make_request("d", 2, max_tokens=2)])
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (3, 4)
    with pytest.raises(QueueFullError, match="holds 2 requests"):
        scheduler.add_all([make_request("e", 1, max_tokens=1)])
    scheduler.abort("b")
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (2, 4)
    scheduler.check()


def test_a_full_queue_takes_the_preempted_back() -> None:
    scheduler = make_scheduler(
        num_blocks=4, block_size=2, max_num_requests=2, max_queued_requests=2
    )
    scheduler.add_all([make_request("a", 1, max_tokens=6), make_request("b", 1, max_tokens=6)])
    run_step(scheduler)
    scheduler.add_all([make_request("c", 1, max_tokens=1), make_request("d", 1, max_tokens=1)])
    preempt(scheduler, scheduler.requests["b"])
    assert scheduler.num_waiting == 3


def test_a_request_preempted_too_often_starts_with_room_for_its_whole_course() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=2)
    scheduler.add_all([make_request("a", 8, max_tokens=2), make_request("b", 1, max_tokens=7)])
    a, b = scheduler.requests.values()
    b.num_preemptions = MAX_PREEMPTIONS
    assert run_step(scheduler).num_new_tokens == {"a": 8}  # 4 of 8 are free, 4 + 1 are needed
    assert run_step(scheduler, finished=["a"]).num_new_tokens == {"a": 1}
    plan = run_step(scheduler)
    assert plan.num_new_tokens == {"b": 1}
    assert len(b.sequence.blocks) == 4
    run_until(scheduler, lambda: b.num_output_tokens == 6)
    assert len(b.sequence.blocks) == 4
    assert b.num_preemptions == MAX_PREEMPTIONS


def test_one_preemption_less_is_not_too_often() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=2)
    scheduler.add_all([make_request("a", 8, max_tokens=2), make_request("b", 1, max_tokens=7)])
    scheduler.requests["b"].num_preemptions = MAX_PREEMPTIONS - 1
    assert run_step(scheduler).num_new_tokens == {"a": 8, "b": 1}


def test_those_preempted_too_often_are_spared_but_not_by_the_oldest() -> None:
    scheduler = full_cache("abc", num_blocks=6)
    a, b, c = scheduler.requests.values()
    c.num_preemptions = MAX_PREEMPTIONS
    preempt(scheduler, b)
    assert (c.num_preemptions, str(c.status)) == (MAX_PREEMPTIONS, "running")

    scheduler = full_cache("abc", num_blocks=6)
    a, b, c = scheduler.requests.values()
    b.num_preemptions = c.num_preemptions = MAX_PREEMPTIONS
    for _ in range(4):
        run_step(scheduler)
    assert (b.num_preemptions, c.num_preemptions) == (MAX_PREEMPTIONS, MAX_PREEMPTIONS + 1)
    assert a.num_preemptions == 0


def test_a_request_between_spared_ones_preempts_itself() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=2)
    scheduler.add_all([make_request("a", 2, max_tokens=8)])
    scheduler.add_all([make_request("b", 1, max_tokens=8), make_request("c", 1, max_tokens=8)])
    a, b, c = scheduler.requests.values()
    c.num_preemptions = 0
    run_step(scheduler)
    c.num_preemptions = MAX_PREEMPTIONS
    preempt(scheduler, b)
    assert c.num_preemptions == MAX_PREEMPTIONS
    assert a.num_preemptions == 0


def test_a_follower_that_just_started_is_not_preempted_by_a_younger_request() -> None:
    """The step that ends l's prompt starts f; then m, younger than f, finds no block."""
    scheduler = make_scheduler(num_blocks=6, block_size=2, max_num_step_tokens=3)
    younger = make_request("m", 1, max_tokens=9, priority=1)
    leader, follower = make_samples("lf", 7, max_tokens=2)
    scheduler.add_all([younger])
    run_step(scheduler)
    scheduler.add_all([leader, follower])
    plan = run_until(scheduler, lambda: leader.num_output_tokens)
    assert plan.forks == {"f": "l"}
    assert plan.num_preemptions == 1
    assert [r.num_preemptions for r in (leader, follower, younger)] == [0, 0, 1]


def test_no_block_of_a_step_s_row_is_given_to_another_row() -> None:
    """As above, but with companions: the last free block is m's, and f has to wait for one."""
    scheduler = make_scheduler(num_blocks=10, block_size=2, max_num_step_tokens=5)
    younger = make_request("m", 1, max_tokens=13, priority=1)
    samples = make_samples("lf", 11, max_tokens=2, num_companions=1, in_picture=True)
    for request in samples:
        request.max_num_companion_tokens = 3
    scheduler.add_all([younger])
    run_step(scheduler)
    scheduler.add_all(samples)
    for _ in range(4):
        plan = scheduler.schedule()
        blocks = [row.blocks[(row.start + row.num_new_tokens - 1) // 2] for row in plan.sequences]
        assert len(set(blocks)) == len(blocks), spans(plan)
        settle(scheduler, plan)
    assert spans(plan) == [("l", OWN, 10, 1), ("l", 0, 1, 1), ("m", OWN, 4, 1)]
    assert (plan.samples, plan.forks, plan.num_preemptions) == (("l", "m"), {}, 0)


def test_a_preempted_expert_choice_prompt_is_whole_again() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=2, max_num_step_tokens=4)
    scheduler.add_all([make_request("a", 1, max_tokens=8)])
    scheduler.add_all([make_request("w", 3, max_tokens=6, whole=True)])
    run_step(scheduler)
    w = scheduler.requests["w"]
    preempt(scheduler, w)
    scheduler.abort("a")
    (row,) = spans(run_step(scheduler))
    assert row[:3] == ("w", OWN, 0)
    assert row[3] >= 3
