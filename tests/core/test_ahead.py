"""Exact examples of steps that are planned while others are in flight."""

from __future__ import annotations

from momaserve.core.plan import OWN
from momaserve.request import RequestStatus
from tests.core.factory import make_request, make_samples, make_scheduler, run_step, settle, spans


def test_a_token_is_computed_before_it_is_known() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4)
    scheduler.add_all([request])
    plans = [scheduler.schedule()]
    for _ in range(2):
        plans.append(scheduler.schedule(ahead={"a"}))
        scheduler.check()
    assert [spans(plan) for plan in plans] == [
        [("a", OWN, s, c)] for s, c in ((0, 4), (4, 1), (5, 1))
    ]
    assert [plan.samples for plan in plans] == [("a",)] * 3
    assert (request.num_tokens, request.num_pending_tokens) == (4, 3)
    for token, plan in zip((20, 21, 22), plans, strict=True):
        settle(scheduler, plan, sampled={"a": [token]})
    assert request.output_token_ids == [20, 21, 22]
    assert request.num_pending_tokens == 0
    assert spans(run_step(scheduler)) == [("a", OWN, 6, 1)]


def test_those_that_cannot_go_ahead_are_left_out() -> None:
    scheduler = make_scheduler()
    scheduler.add_all([make_request("a", 4), make_request("b", 4)])
    first = scheduler.schedule()
    second = scheduler.schedule(ahead={"b"})
    assert spans(second) == [("b", OWN, 4, 1)]
    assert scheduler.schedule().sequences == ()
    settle(scheduler, first)
    third = scheduler.schedule()
    assert spans(third) == [("a", OWN, 4, 1)]
    settle(scheduler, second)
    settle(scheduler, third)
    assert run_step(scheduler).samples == ("a", "b")


def test_a_prompt_goes_on_while_its_first_part_is_in_flight() -> None:
    scheduler = make_scheduler(max_num_step_tokens=4)
    scheduler.add_all([make_request("a", 10)])
    plans = [scheduler.schedule() for _ in range(4)]
    assert [spans(plan) for plan in plans] == [
        [("a", OWN, 0, 4)],
        [("a", OWN, 4, 4)],
        [("a", OWN, 8, 2)],
        [],
    ]
    for plan in plans[:3]:
        settle(scheduler, plan)


def test_others_start_while_a_step_is_in_flight() -> None:
    scheduler = make_scheduler()
    scheduler.add_all([make_request("a", 4)])
    first = scheduler.schedule()
    scheduler.add_all([make_request("b", 4)])
    second = scheduler.schedule(ahead={"a"})
    assert second.samples == ("a", "b")
    settle(scheduler, first)
    settle(scheduler, second)


def test_a_request_that_ends_is_passed_over_in_the_step_planned_ahead() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4)
    scheduler.add_all([request, make_request("b", 4)])
    first = scheduler.schedule()
    second = scheduler.schedule(ahead={"a", "b"})
    settle(scheduler, first, sampled={"a": [20]}, finished=["a"])
    settle(scheduler, second, sampled={"a": [21]}, finished=["a"])
    assert request.output_token_ids == [20]
    assert list(scheduler.requests) == ["b"]


def test_abort_with_two_steps_in_flight() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4)
    scheduler.add_all([request])
    plans = [scheduler.schedule(), scheduler.schedule(ahead={"a"})]
    scheduler.abort("a")
    scheduler.check()
    assert scheduler.kv_cache.num_free_blocks == scheduler.kv_cache.num_blocks
    again = make_request("a", range(5))
    scheduler.add_all([again])
    plans.append(scheduler.schedule())
    for plan in plans:
        settle(scheduler, plan)
    assert request.output_token_ids == []
    assert again.output_token_ids == [7]


def test_a_block_whose_last_token_is_not_known_yet_has_no_key() -> None:
    scheduler = make_scheduler(block_size=4)
    scheduler.add_all([make_request("a", range(3))])
    first = scheduler.schedule()
    second = scheduler.schedule(ahead={"a"})
    assert scheduler.kv_cache.num_cached_blocks == 0
    settle(scheduler, first, sampled={"a": [50]})
    settle(scheduler, second)
    run_step(scheduler)
    assert scheduler.kv_cache.num_cached_blocks == 1
    scheduler.add_all([make_request("b", [0, 1, 2, 50, 99])])
    assert ("b", OWN, 4, 1) in spans(run_step(scheduler))


def test_a_follower_copies_its_end_whoever_goes_first() -> None:
    scheduler = make_scheduler()
    scheduler.add_all(make_samples("ab", 6))
    first = scheduler.schedule()
    second = scheduler.schedule(ahead={"b"})
    assert spans(second) == [("b", OWN, 6, 1)]
    assert second.copies == ((1, 2),)
    settle(scheduler, first)
    third = scheduler.schedule(ahead={"b"})
    assert spans(third) == [("a", OWN, 6, 1), ("b", OWN, 7, 1)]
    assert third.copies == ()
    settle(scheduler, second)
    settle(scheduler, third)


def test_companions_go_ahead_with_their_request() -> None:
    scheduler = make_scheduler()
    request = make_request("g", 3, num_companions=1, in_picture=True)
    scheduler.add_all([request])
    first = scheduler.schedule()
    second = scheduler.schedule(ahead={"g"})
    assert spans(second) == [("g", OWN, 3, 1), ("g", 0, 2, 1)]
    assert second.samples == ("g",)
    settle(scheduler, first, sampled={"g": [30]})
    settle(scheduler, second, sampled={"g": [31]})
    assert request.companions[0].token_ids == [1, 2, 30, 31]
    assert spans(run_step(scheduler)) == [("g", OWN, 4, 1), ("g", 0, 3, 1)]


def test_a_request_preempted_in_flight_gets_its_tokens_and_waits_for_them() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    a, b = (make_request(name, 1, max_tokens=6) for name in "ab")
    scheduler.add_all([a, b])
    for _ in range(3):
        run_step(scheduler)
    plans = [scheduler.schedule(), scheduler.schedule(ahead={"a", "b"})]
    assert b.status is RequestStatus.WAITING
    assert b.num_pending_tokens == 1
    num_tokens = b.num_tokens
    scheduler.abort("a")
    assert scheduler.schedule().sequences == ()  # its next token is not there yet
    settle(scheduler, plans[0], sampled={"b": [50]})
    assert b.num_tokens == num_tokens + 1
    third = scheduler.schedule()
    assert spans(third)[0][:2] == ("b", OWN)
    settle(scheduler, plans[1])
    settle(scheduler, third)
    assert b.output_token_ids[-2:] == [50, 7]


def test_a_request_may_end_while_it_is_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=2)
    a, b = (make_request(name, 1, max_tokens=6) for name in "ab")
    scheduler.add_all([a, b])
    for _ in range(3):
        run_step(scheduler)
    first, second = scheduler.schedule(), scheduler.schedule(ahead={"a", "b"})
    settle(scheduler, first, finished=["b"])
    settle(scheduler, second)
    assert b.status is RequestStatus.FINISHED
    assert scheduler.num_waiting == 0
    assert list(scheduler.requests) == ["a"]


def test_steps_in_flight_that_fail_leave_no_key() -> None:
    scheduler = make_scheduler(block_size=2)
    scheduler.add_all([make_request("a", 4)])
    plans = [scheduler.schedule()]
    scheduler.add_all([make_request("b", 4)])
    plans.append(scheduler.schedule(ahead={"a"}))
    for name in "ab":
        assert scheduler.abort(name, broken=True)
    for plan in plans:
        scheduler.update(plan, {}, ())
        scheduler.check()
    assert scheduler.kv_cache.num_cached_blocks == 0
    assert not scheduler.has_work
