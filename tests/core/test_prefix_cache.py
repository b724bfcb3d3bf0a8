"""Exact examples of what requests share, whom they share it with, and what that saves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from momaserve.core.plan import OWN
from momaserve.core.scheduler import Scheduler
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

PREFIX = list(range(8))
"""Exactly two full blocks."""


def finish(scheduler: Scheduler, *requests: Request, sampled: Sequence[Sequence[int]]) -> None:
    """Runs requests to their ends; each step samples the next of `sampled` for all of them."""
    scheduler.add_all(requests)
    names = [request.request_id for request in requests]
    for number, token_ids in enumerate(sampled, start=1):
        ends = names if number == len(sampled) else []
        plan = scheduler.schedule()
        settle(scheduler, plan, sampled=dict.fromkeys(names, token_ids), finished=ends)
    assert not scheduler.has_work


def test_a_shared_prefix_is_computed_once() -> None:
    scheduler = make_scheduler(num_blocks=8, block_size=4)
    a, b = make_request("a", [*PREFIX, 100]), make_request("b", [*PREFIX, 200])
    scheduler.add_all([a])
    first = run_step(scheduler)
    assert (first.num_cache_queries, first.num_cache_hits) == (9, 0)
    scheduler.add_all([b])
    second = run_step(scheduler)
    assert spans(second) == [("a", OWN, 9, 1), ("b", OWN, 8, 1)]
    assert second.block_ids("a")[:2] == second.block_ids("b")[:2] == (0, 1)
    assert (second.num_cache_queries, second.num_cache_hits) == (9, 8)
    assert (a.num_cached_tokens, b.num_cached_tokens) == (0, 8)


def test_a_prefix_outlives_its_request() -> None:
    scheduler = make_scheduler()
    finish(scheduler, make_request("a", [*PREFIX, 100]), sampled=[[7]])
    assert scheduler.kv_cache.num_cached_blocks == 2
    scheduler.add_all([make_request("b", [*PREFIX, 200])])
    assert spans(run_step(scheduler)) == [("b", OWN, 8, 1)]


def test_the_last_token_is_always_computed() -> None:
    scheduler = make_scheduler()
    finish(scheduler, make_request("a", PREFIX), sampled=[[7]])
    b = make_request("b", PREFIX)
    scheduler.add_all([b])
    plan = run_step(scheduler)
    assert spans(plan) == [("b", OWN, 4, 4)]
    assert plan.samples == ("b",)
    assert b.num_cached_tokens == 4


def test_an_answer_is_a_prefix_too() -> None:
    """A conversation goes on: prompt and answer come back as the next prompt."""
    scheduler = make_scheduler()
    answer = [[50], [51], [52], [53]]
    finish(scheduler, make_request("a", range(5)), sampled=answer)
    scheduler.add_all([make_request("b", [*range(5), 50, 51, 52, 53, 99])])
    assert spans(run_step(scheduler)) == [("b", OWN, 8, 2)]


def test_the_last_token_of_an_answer_is_not_computed_and_not_offered() -> None:
    scheduler = make_scheduler()
    finish(scheduler, make_request("a", range(5)), sampled=[[50], [51], [52]])
    scheduler.add_all([make_request("b", [*range(5), 50, 51, 52, 99])])
    assert spans(run_step(scheduler)) == [("b", OWN, 4, 5)]


@pytest.mark.parametrize("salts", [(None, "a"), ("a", "b"), ("a", None)])
def test_salts_isolate(salts: tuple[str | None, str | None]) -> None:
    scheduler = make_scheduler()
    finish(scheduler, make_request("a", [*PREFIX, 1], salt=salts[0]), sampled=[[7]])
    scheduler.add_all([make_request("b", [*PREFIX, 1], salt=salts[1])])
    plan = run_step(scheduler, finished=["b"])
    assert (plan.num_tokens, plan.num_cache_hits) == (9, 0)
    scheduler.add_all([make_request("c", [*PREFIX, 1], salt=salts[0])])
    assert run_step(scheduler).num_tokens == 1


def test_identical_prompts_of_one_step_are_computed_once() -> None:
    """The blocks are named when the step is planned: it writes all K/V before it reads any."""
    scheduler = make_scheduler()
    scheduler.add_all([make_request(name, [*PREFIX, 1]) for name in "abc"])
    plan = run_step(scheduler)
    assert spans(plan) == [("a", OWN, 0, 9), ("b", OWN, 8, 1), ("c", OWN, 8, 1)]
    assert plan.samples == ("a", "b", "c")


def test_identical_long_prompts_are_computed_once_in_chunks() -> None:
    scheduler = make_scheduler(max_num_step_tokens=16)
    scheduler.add_all([make_request(name, range(37)) for name in "ab"])
    assert [spans(run_step(scheduler)) for _ in range(3)] == [
        [("a", OWN, 0, 16)],
        [("a", OWN, 16, 16)],
        [("a", OWN, 32, 5), ("b", OWN, 36, 1)],
    ]


def test_a_request_on_its_way_takes_what_others_have_computed_meanwhile() -> None:
    """Guidance keeps a's last tokens back, and so lets b into the step before a is through."""
    scheduler = make_scheduler(max_num_step_tokens=24)
    a = make_request("a", range(25), num_companions=1, in_picture=True)
    b = make_request("b", [*range(24), *range(50, 70)])
    scheduler.add_all([make_request("x", 3), a])
    assert spans(run_step(scheduler)) == [("x", OWN, 0, 3), ("a", OWN, 0, 21)]
    scheduler.add_all([b])
    assert spans(run_step(scheduler))[-1] == ("b", OWN, 24, 17)


def test_blocks_that_a_chunk_filled_in_part_are_offered_when_they_are_full() -> None:
    scheduler = make_scheduler(max_num_step_tokens=6, block_size=4)
    finish(scheduler, make_request("a", range(17)), sampled=[[], [], [7]])
    scheduler.add_all([make_request("b", range(17))])
    assert spans(run_step(scheduler)) == [("b", OWN, 16, 1)]


def test_a_prompt_that_is_scored_takes_no_hits_but_gives_them() -> None:
    scheduler = make_scheduler()
    finish(scheduler, make_request("a", [*PREFIX, 1]), sampled=[[7]])
    b = make_request("b", [*PREFIX, 1], prompt_logprobs=0)
    scheduler.add_all([b])
    plan = run_step(scheduler, finished=["b"])
    assert spans(plan) == [("b", OWN, 0, 9)]
    assert (plan.num_cache_queries, plan.num_cache_hits, b.num_cached_tokens) == (0, 0, 0)
    other = make_scheduler()
    finish(other, make_request("b", [*PREFIX, 1], prompt_logprobs=0), sampled=[[7]])
    other.add_all([make_request("c", [*PREFIX, 1])])
    assert run_step(other).num_tokens == 1


def test_a_prompt_that_is_scored_takes_no_hits_after_a_preemption_either() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=2)
    a = make_request("a", 2, max_tokens=8)
    b = make_request("b", 4, max_tokens=4, prompt_logprobs=0)
    scheduler.add_all([a, b])
    run_until(scheduler, lambda: b.num_preemptions)
    scheduler.abort("a")
    assert spans(run_step(scheduler))[0][:3] == ("b", OWN, 0)


def test_expert_choice_prompts_share_nothing_with_other_submissions() -> None:
    scheduler = make_scheduler()
    finish(scheduler, make_request("a", [*PREFIX, 1], whole=True), sampled=[[7]])
    assert scheduler.kv_cache.num_cached_blocks == 0
    scheduler.add_all([make_request("b", [*PREFIX, 1], whole=True), make_request("c", PREFIX)])
    scheduler.add_all([make_request("d", [*PREFIX, 1])])
    assert run_step(scheduler).num_new_tokens == {"b": 9, "c": 7}


def test_expert_choice_samples_share_their_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add_all(make_samples("ab", [*PREFIX, 1], whole=True))
    plan = run_step(scheduler)
    assert spans(plan) == [("a", OWN, 0, 9)]
    assert plan.forks == {"b": "a"}
    assert run_step(scheduler).copies == ((2, 3),)


def test_without_prefix_caching_nothing_is_remembered() -> None:
    scheduler = make_scheduler(prefix_caching=False)
    scheduler.add_all([make_request(name, PREFIX) for name in "ab"])
    assert run_step(scheduler).num_new_tokens == {"a": 8, "b": 8}
    assert scheduler.kv_cache.num_cached_blocks == 0


def test_a_waiting_request_that_cannot_start_gives_its_hits_back() -> None:
    scheduler = make_scheduler(num_blocks=7, block_size=4)
    finish(scheduler, make_request("a", PREFIX), sampled=[[7]])
    scheduler.add_all([make_request("b", 12), make_request("c", [*PREFIX, *range(20, 28)])])
    run_step(scheduler)
    c = scheduler.requests["c"]
    assert scheduler.num_waiting == 1
    assert (c.sequence.blocks, c.sequence.num_computed_tokens, c.num_cached_tokens) == ([], 0, 0)
    run_step(scheduler, finished=["b"])
    run_step(scheduler)
    assert c.num_cached_tokens == 8


def test_a_step_that_failed_leaves_no_key() -> None:
    scheduler = make_scheduler()
    finish(scheduler, make_request("x", range(100, 105)), sampled=[[7]])
    scheduler.add_all([make_request("a", [*PREFIX, 1]), make_request("b", 6)])
    plan = scheduler.schedule()
    assert scheduler.kv_cache.num_cached_blocks == 4
    for name in "ab":
        assert scheduler.abort(name, broken=True)
    scheduler.update(plan, {}, ())
    scheduler.check()
    assert scheduler.kv_cache.num_cached_blocks == 1  # x's is as good as before
    scheduler.add_all([make_request("c", [*PREFIX, 1])])
    assert run_step(scheduler).num_tokens == 9


def test_a_step_that_failed_leaves_no_key_of_a_companion() -> None:
    scheduler = make_scheduler(block_size=2)
    scheduler.add_all([make_request("g", 3, num_companions=1, in_picture=True)])
    plan = scheduler.schedule()
    assert scheduler.kv_cache.num_cached_blocks == 2
    scheduler.abort("g", broken=True)
    scheduler.update(plan, {}, ())
    assert scheduler.kv_cache.num_cached_blocks == 0


def test_a_cache_that_was_emptied_has_no_key_of_a_request_aborted_in_a_failed_step() -> None:
    scheduler = make_scheduler()
    scheduler.add_all([make_request("a", [*PREFIX, 1])])
    plan = scheduler.schedule()
    scheduler.abort("a")  # the client went away; what the step computes may still be of use
    assert scheduler.kv_cache.num_cached_blocks == 2
    assert not scheduler.abort("a", broken=True)  # but then it failed
    scheduler.update(plan, {}, ())
    scheduler.kv_cache.forget_all()
    scheduler.check()
    assert scheduler.kv_cache.num_cached_blocks == 0


def test_a_cache_that_was_emptied_has_no_key_of_a_request_preempted_in_a_failed_step() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=2)
    a, b = make_request("a", 3, max_tokens=9), make_request("b", 4, max_tokens=2)
    scheduler.add_all([a, b])
    plans = [scheduler.schedule()]
    plans += [scheduler.schedule(ahead={"a"}) for _ in range(6)]
    assert b.num_preemptions == 1
    assert scheduler.kv_cache.num_cached_blocks == 2  # of each the first
    for name in "ab":
        assert scheduler.abort(name, broken=True)
    for plan in plans:
        scheduler.update(plan, {}, ())
    scheduler.kv_cache.forget_all()
    scheduler.check()
    assert scheduler.kv_cache.num_cached_blocks == 0


def test_requests_that_run_go_on_when_the_cache_is_emptied() -> None:
    scheduler = make_scheduler()
    scheduler.add_all([make_request("a", range(10))])
    run_step(scheduler)
    scheduler.kv_cache.forget_all()
    scheduler.check()
    plans = [run_step(scheduler) for _ in range(4)]
    assert [spans(plan) for plan in plans] == [[("a", OWN, 10 + i, 1)] for i in range(4)]
    scheduler.add_all([make_request("b", range(10))])
    assert ("b", OWN, 0, 10) in spans(run_step(scheduler))
