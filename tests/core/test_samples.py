"""Exact examples of the n samples of one prompt: they fork, share and part."""

from __future__ import annotations

from momaserve.core.plan import OWN
from momaserve.request import RequestStatus
from tests.core.factory import (
    make_request,
    make_samples,
    make_scheduler,
    run_step,
    run_until,
    settle,
    spans,
)


def test_followers_start_in_the_step_their_leader_samples_in() -> None:
    scheduler = make_scheduler(max_num_step_tokens=4)
    scheduler.add_all(make_samples("abc", 6))
    first = run_step(scheduler)
    assert (spans(first), first.samples, first.forks) == ([("a", OWN, 0, 4)], (), {})
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    second = run_step(scheduler, sampled={"a": [20], "b": [21], "c": [22]})
    assert spans(second) == [("a", OWN, 4, 2)]
    assert second.samples == ("a", "b", "c")
    assert second.forks == {"b": "a", "c": "a"}
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 0)
    requests = scheduler.requests
    assert [requests[name].output_token_ids for name in "abc"] == [[20], [21], [22]]
    assert requests["a"].sequence.blocks == requests["c"].sequence.blocks == [0, 1]


def test_each_sample_but_the_last_copies_the_end_of_the_prompt_once() -> None:
    scheduler = make_scheduler()
    scheduler.add_all(make_samples("abc", 6))
    assert run_step(scheduler).copies == ()
    plan = run_step(scheduler)
    assert plan.copies == ((1, 2), (1, 3))
    assert [plan.block_ids(name) for name in "abc"] == [(0, 2), (0, 3), (0, 1)]
    assert spans(plan) == [(name, OWN, 6, 1) for name in "abc"]
    for _ in range(3):
        assert run_step(scheduler).copies == ()


def test_a_prompt_that_fills_its_blocks_is_never_copied() -> None:
    scheduler = make_scheduler()
    scheduler.add_all(make_samples("ab", 8))
    plans = [run_step(scheduler) for _ in range(3)]
    assert [plan.copies for plan in plans] == [(), (), ()]
    assert plans[1].block_ids("a")[:2] == plans[1].block_ids("b")[:2]


def test_a_sample_that_is_alone_by_then_copies_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.add_all(make_samples("ab", 6))
    run_step(scheduler, finished=["a"])
    plan = run_step(scheduler)
    assert plan.copies == ()
    assert plan.block_ids("b") == (0, 1)


def test_samples_that_part_share_what_is_full_and_nothing_else() -> None:
    scheduler = make_scheduler(num_blocks=16)
    scheduler.add_all(make_samples("ab", 6, max_tokens=16))
    for token in range(10):
        run_step(scheduler, sampled={"a": [100 + token], "b": [200 + token]})
    a, b = (scheduler.requests[name].sequence for name in "ab")
    assert a.blocks[0] == b.blocks[0]
    assert not set(a.blocks[1:]) & set(b.blocks[1:])
    assert a.block_keys[0] == b.block_keys[0]
    assert not set(a.block_keys[1:]) & set(b.block_keys[1:])


def test_a_forced_opening_is_computed_before_the_fork() -> None:
    scheduler = make_scheduler()
    samples = make_samples("ab", 3)
    for request in samples:
        request.sequence.token_ids.append(9)
    scheduler.add_all(samples)
    plan = run_step(scheduler)
    assert spans(plan) == [("a", OWN, 0, 4)]
    assert plan.forks == {"b": "a"}


def test_followers_without_a_slot_queue_on_their_own() -> None:
    scheduler = make_scheduler(max_num_requests=2)
    scheduler.add_all(make_samples("abcd", 6))
    plan = run_step(scheduler)
    assert plan.forks == {"b": "a"}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)
    run_step(scheduler, finished=["a"])
    plan = run_step(scheduler)  # c starts from the prompt's one full block
    assert spans(plan)[-1] == ("c", OWN, 4, 2)
    assert plan.forks == {}
    run_step(scheduler, finished=["b", "c"])
    assert spans(run_step(scheduler)) == [("d", OWN, 4, 2)]


def test_followers_come_before_later_requests() -> None:
    scheduler = make_scheduler(max_num_requests=1)
    scheduler.add_all(make_samples("ab", 6))
    scheduler.add_all([make_request("x", 1)])
    assert run_step(scheduler, finished=["a"]).samples == ("a",)
    assert run_step(scheduler, finished=["b"]).samples == ("b",)
    assert run_step(scheduler, finished=["x"]).samples == ("x",)


def test_followers_do_not_pass_an_older_request_that_waits() -> None:
    """h has the better priority, but finds no room for two sequences beside l."""
    scheduler = make_scheduler(max_num_requests=2, max_num_step_tokens=4)
    samples = make_samples("lf", 6)
    scheduler.add_all(samples)
    run_step(scheduler)
    scheduler.add_all([make_request("h", 1, num_companions=1, priority=-1)])
    plan = run_step(scheduler)
    assert (plan.samples, plan.forks) == (("l",), {})
    assert run_step(scheduler, finished=["l"]).samples == ("l",)
    assert run_step(scheduler, finished=["h"]).samples == ("h",)
    assert spans(run_step(scheduler)) == [("f", OWN, 4, 2)]


def test_if_the_leader_is_aborted_the_next_sample_leads() -> None:
    scheduler = make_scheduler(max_num_step_tokens=4)
    samples = make_samples("abc", 6)
    scheduler.add_all(samples)
    run_step(scheduler)
    scheduler.abort("a")
    scheduler.check()
    assert [request.leader_id for request in samples[1:]] == [None, "b"]
    plan = run_step(scheduler)
    assert spans(plan) == [("b", OWN, 4, 2)]  # a's first block is remembered
    assert plan.forks == {"c": "b"}


def test_if_the_leader_is_aborted_while_its_step_runs_its_samples_go_on() -> None:
    scheduler = make_scheduler()
    scheduler.add_all(make_samples("ab", 6))
    plan = scheduler.schedule()
    scheduler.abort("a")
    scheduler.check()
    settle(scheduler, plan)
    assert scheduler.requests["b"].output_token_ids == [7]
    plan = run_step(scheduler)
    assert spans(plan) == [("b", OWN, 6, 1)]
    assert plan.copies == ()


def test_a_follower_may_be_aborted_before_its_leader_samples() -> None:
    scheduler = make_scheduler(max_num_step_tokens=4)
    scheduler.add_all(make_samples("abc", 6))
    run_step(scheduler)
    scheduler.abort("b")
    scheduler.check()
    assert run_step(scheduler).forks == {"c": "a"}


def test_a_follower_may_end_with_its_first_token() -> None:
    scheduler = make_scheduler()
    samples = make_samples("ab", 6)
    scheduler.add_all(samples)
    run_step(scheduler, finished=["b"])
    assert samples[1].status is RequestStatus.FINISHED
    assert samples[1].output_token_ids == [7]
    assert run_step(scheduler).copies == ()


def test_samples_of_a_scored_prompt_share_it() -> None:
    scheduler = make_scheduler()
    scheduler.add_all(make_samples("ab", 6, prompt_logprobs=0))
    plan = run_step(scheduler)
    assert spans(plan) == [("a", OWN, 0, 6)]
    assert plan.forks == {"b": "a"}


def test_without_prefix_caching_samples_share_their_prompt_nevertheless() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    scheduler.add_all(make_samples("ab", 6))
    assert run_step(scheduler).forks == {"b": "a"}
    assert run_step(scheduler).copies == ((1, 2),)


def test_a_waiting_leader_that_is_aborted_hands_over_its_place() -> None:
    scheduler = make_scheduler()
    scheduler.add_all([*make_samples("ab", 6), make_request("x", 3)])
    scheduler.abort("a")
    assert spans(run_step(scheduler)) == [("b", OWN, 0, 6), ("x", OWN, 0, 3)]


def test_a_leader_that_is_preempted_in_its_prompt_keeps_its_followers() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=2, max_num_step_tokens=3)
    old = make_request("o", 1, max_tokens=9)
    leader, follower = make_samples("lf", 7, max_tokens=2)
    scheduler.add_all([old])
    run_step(scheduler)
    scheduler.add_all([leader, follower])
    run_step(scheduler)
    scheduler._preempt(leader)  # as someone older does that needs its blocks
    scheduler.check()
    assert follower.leader_id == "l"
    scheduler.abort("o")
    plan = run_until(scheduler, lambda: leader.num_output_tokens)
    assert plan.forks == {"f": "l"}
