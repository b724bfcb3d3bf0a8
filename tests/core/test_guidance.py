"""Exact examples of companions: second sequences in lockstep with their request."""

from __future__ import annotations

import pytest

from momaserve.core.plan import OWN
from momaserve.core.scheduler import Scheduler
from momaserve.request import Request
from tests.core.factory import (
    make_companion,
    make_request,
    make_samples,
    make_scheduler,
    run_step,
    run_until,
    spans,
)


def begin_picture(request: Request) -> None:
    request.companions = [make_companion() for _ in range(request.num_companions)]


def guide(scheduler: Scheduler, num_prompt: int = 4, num_companions: int = 1) -> Request:
    """Adds a request that is about to draw."""
    request = make_request("g", num_prompt, num_companions=num_companions, in_picture=True)
    scheduler.add_all([request])
    return request


def test_a_picture_from_beginning_to_end() -> None:
    scheduler = make_scheduler(block_size=4)
    request = make_request("g", 3, num_companions=1)
    scheduler.add_all([request])
    assert spans(run_step(scheduler, sampled={"g": [2]})) == [("g", OWN, 0, 3)]
    begin_picture(request)  # 2 is begin_image
    plan = run_step(scheduler, sampled={"g": [30]})
    assert spans(plan) == [("g", OWN, 3, 1), ("g", 0, 0, 2)]
    assert plan.samples == ("g",)
    plan = run_step(scheduler, sampled={"g": [31]})
    assert spans(plan) == [("g", OWN, 4, 1), ("g", 0, 2, 1)]
    assert request.companions[0].token_ids == [1, 2, 30, 31]
    num_free = scheduler.kv_cache.num_free_blocks
    scheduler.end_companions(request)
    scheduler.check()
    assert request.companions == []
    assert scheduler.kv_cache.num_free_blocks == num_free + 1
    assert spans(run_step(scheduler)) == [("g", OWN, 5, 1)]


def test_a_picture_that_the_prompt_begins() -> None:
    scheduler = make_scheduler()
    guide(scheduler, 3, num_companions=2)
    plan = run_step(scheduler)
    assert spans(plan) == [("g", OWN, 0, 3), ("g", 0, 0, 2), ("g", 1, 0, 2)]
    assert plan.samples == ("g",)
    assert plan.num_new_tokens == {"g": 3}
    assert plan.num_tokens == 7


def test_companions_have_blocks_of_their_own() -> None:
    scheduler = make_scheduler(block_size=4)
    request = guide(scheduler, 3, num_companions=2)
    run_step(scheduler)
    assert request.sequence.blocks == [0]
    assert [companion.blocks for companion in request.companions] == [[1], [2]]


@pytest.mark.parametrize("budget", range(2, 12))
@pytest.mark.parametrize("num_prompt", range(1, 9))
def test_last_tokens_are_computed_in_one_step_for_any_budget(budget: int, num_prompt: int) -> None:
    scheduler = make_scheduler(max_num_step_tokens=budget)
    request = guide(scheduler, num_prompt)
    for _ in range(2 + num_prompt):
        plan = run_step(scheduler)
        assert 1 <= plan.num_tokens <= budget
        ends = {companion: start + count for _, companion, start, count in spans(plan)}
        if plan.samples:
            assert ends[OWN] == num_prompt
            assert ends[0] == 2
            break
        assert ends.get(OWN, 0) < num_prompt
        assert ends.get(0, 0) < 2
    assert plan.samples == ("g",)
    assert request.output_token_ids == [7]
    assert spans(run_step(scheduler)) == [("g", OWN, num_prompt, 1), ("g", 0, 2, 1)]


def test_companions_count_against_the_limits_before_they_are_there() -> None:
    scheduler = make_scheduler(max_num_requests=3)
    scheduler.add_all([make_request("g", 1, num_companions=1), make_request("h", 1)])
    scheduler.add_all([make_request("i", 1)])
    assert run_step(scheduler).samples == ("g", "h")
    assert run_step(scheduler, finished=["h"]).samples == ("g", "h")
    assert run_step(scheduler, finished=["g"]).samples == ("g", "i")
    scheduler.add_all([make_request("j", 1, num_companions=1)])
    assert run_step(scheduler).samples == ("i", "j")


def test_companions_count_against_the_tokens_of_a_step() -> None:
    scheduler = make_scheduler(max_num_step_tokens=3)
    scheduler.add_all([make_request("g", 1, num_companions=1), make_request("h", 1)])
    scheduler.add_all([make_request("i", 1)])
    assert run_step(scheduler).samples == ("g", "h")  # two and one
    begin_picture(scheduler.requests["g"])
    assert run_step(scheduler).num_tokens == 3 - 1  # h's and the companion's first token
    assert spans(run_step(scheduler))[-2:] == [("g", 0, 1, 1), ("h", OWN, 2, 1)]


def test_the_room_of_companions_is_needed_from_the_start() -> None:
    for num_blocks, starts in ((7, False), (8, True)):
        scheduler = make_scheduler(num_blocks=num_blocks, block_size=4)
        scheduler.add_all([make_request("a", 4, max_tokens=4)])
        run_step(scheduler)
        run_step(scheduler)
        # g needs 2 blocks for 4 + 1 tokens and 3 for its companion; a may need one more
        request = make_request("g", 4, max_tokens=4, num_companions=1, num_codes=10)
        scheduler.add_all([request])
        assert ("g" in run_step(scheduler).samples) is starts


def preempted_in_its_picture() -> tuple[Scheduler, Request]:
    """A request that fills the cache by its end, and is alone in it again."""
    scheduler = make_scheduler(num_blocks=9, block_size=2)
    request = make_request("g", 2, max_tokens=7, num_companions=1, num_codes=6, in_picture=True)
    scheduler.add_all([request])
    run_step(scheduler)
    run_step(scheduler)
    scheduler.add_all([make_request("o", 5, max_tokens=12, priority=-1)])
    run_until(scheduler, lambda: request.num_preemptions)
    scheduler.abort("o")
    scheduler.check()
    return scheduler, request


def test_companions_are_preempted_with_their_request() -> None:
    _, request = preempted_in_its_picture()
    companion = request.companions[0]
    assert (companion.blocks, companion.num_computed_tokens) == ([], 0)
    assert companion.num_tokens == 2 + request.num_output_tokens == 6


def test_a_guided_request_that_fills_the_cache_starts_again_beside_its_hits() -> None:
    """The blocks that its companion finds in the cache are of the room that it needs."""
    scheduler, request = preempted_in_its_picture()
    plan = scheduler.schedule()
    assert plan.samples == ("g",)
    ends = {index: start + count for _, index, start, count in spans(plan)}
    assert ends == {OWN: 6, 0: 6}


def test_abort_and_finish_free_companions() -> None:
    for ends in (True, False):
        scheduler = make_scheduler()
        guide(scheduler)
        run_step(scheduler, finished=["g"] if ends else [])
        assert scheduler.abort("g") is not ends
        scheduler.check()
        assert scheduler.kv_cache.num_free_blocks == scheduler.kv_cache.num_blocks


def test_companions_may_end_while_their_request_waits() -> None:
    scheduler = make_scheduler()
    request = guide(scheduler)
    scheduler.end_companions(request)
    scheduler.check()
    assert spans(run_step(scheduler)) == [("g", OWN, 0, 4)]


def test_followers_bring_their_companions_into_the_fork_s_step() -> None:
    scheduler = make_scheduler()
    scheduler.add_all(make_samples("ab", 3, num_companions=1, in_picture=True))
    plan = run_step(scheduler)
    assert spans(plan) == [("a", OWN, 0, 3), ("a", 0, 0, 2), ("b", 0, 0, 2)]
    assert plan.samples == ("a", "b")
    assert plan.forks == {"b": "a"}
    plan = run_step(scheduler)
    assert spans(plan) == [("a", OWN, 3, 1), ("a", 0, 2, 1), ("b", OWN, 3, 1), ("b", 0, 2, 1)]
    assert plan.copies == ((0, 3),)


def test_followers_whose_companions_have_no_tokens_left_queue_on_their_own() -> None:
    scheduler = make_scheduler(max_num_step_tokens=6)
    scheduler.add_all(make_samples("ab", 3, num_companions=1, in_picture=True))
    plan = run_step(scheduler)
    assert plan.samples == ("a",)
    assert plan.forks == {}
    assert spans(plan)[2:] == [("b", OWN, 0, 1)]  # 1 token is left, but 2 are needed
    assert run_step(scheduler).samples == ("a", "b")


def test_followers_leave_the_tokens_of_those_that_run_alone() -> None:
    """b's companion would fit behind a's prompt, but x needs its token of the step too."""
    scheduler = make_scheduler(max_num_step_tokens=5)
    scheduler.add_all([make_request("x", 1, priority=1)])
    run_step(scheduler)
    samples = make_samples("ab", 5, num_companions=1, in_picture=True)
    scheduler.add_all(samples)
    for _ in range(4):
        plan = run_step(scheduler)
        assert plan.num_tokens <= 5, spans(plan)
        assert ("x", OWN) in [row[:2] for row in spans(plan)]


def test_companions_share_full_blocks_too() -> None:
    """Two requests have drawn the same codes so far; the second was preempted, say."""
    scheduler = make_scheduler(block_size=2)
    first, second = (make_request(n, 1, num_companions=1, in_picture=True) for n in "gh")
    scheduler.add_all([first])
    for token in (50, 51):
        run_step(scheduler, sampled={"g": [token]})
    for sequence in (second.sequence, second.companions[0]):
        sequence.token_ids += [50, 51]
    scheduler.add_all([second])
    plan = run_step(scheduler)
    assert spans(plan)[-2:] == [("h", OWN, 0, 3), ("h", 0, 2, 2)]
    assert first.companions[0].blocks[0] == second.companions[0].blocks[0]


def test_expert_choice_prompts_have_companions() -> None:
    scheduler = make_scheduler(max_num_step_tokens=8)
    scheduler.add_all([make_request("x", 2)])
    request = make_request("w", 6, whole=True, num_companions=1, in_picture=True)
    scheduler.add_all([request])
    assert run_step(scheduler, finished=["x"]).samples == ("x",)
    plan = run_step(scheduler)
    assert spans(plan) == [("w", OWN, 0, 6), ("w", 0, 0, 2)]
    assert plan.samples == ("w",)
