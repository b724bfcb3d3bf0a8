"""Exact examples of scheduling: what a step computes, who is admitted, who is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from momaserve.core.plan import PlannedRequest
from momaserve.core.scheduler import RETRY_AFTER_S
from momaserve.errors import PromptError, QueueFullError, RequestError
from momaserve.request import RequestStatus
from tests.core.factory import make_request, make_scheduler, run_step


def test_core_imports_no_torch() -> None:
    code = "import sys, momaserve.core.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_idle_scheduler_plans_nothing() -> None:
    scheduler = make_scheduler()
    assert not scheduler.has_work
    assert scheduler.schedule().requests == ()
    assert scheduler.schedule().num_tokens == 0


def test_one_request_from_prompt_to_finish() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    request = make_request("a", [10, 11, 12, 13], max_tokens=4)
    scheduler.add(request)
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (1, 4)

    prompt = run_step(scheduler, sampled={"a": [20]})
    assert prompt.requests == (
        PlannedRequest(request_id="a", start=0, num_new_tokens=4, block_ids=(0,), samples=True),
    )
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)
    assert scheduler.num_waiting_tokens == 0
    assert str(request.status) == "running"

    decode = run_step(scheduler, sampled={"a": [21]}, finished=["a"])
    assert decode.requests == (
        PlannedRequest(request_id="a", start=4, num_new_tokens=1, block_ids=(0, 1), samples=True),
    )
    assert str(request.status) == "finished"
    assert request.output_token_ids == [20, 21]
    assert request.num_computed_tokens == 5
    assert not scheduler.has_work
    assert scheduler.kv_cache.usage == 0.0


def test_a_long_prompt_is_computed_in_chunks_and_samples_once() -> None:
    scheduler = make_scheduler(max_num_step_tokens=4)
    scheduler.add(make_request("a", 10))
    steps = [run_step(scheduler).requests[0] for _ in range(4)]
    assert [(s.start, s.num_new_tokens, s.samples) for s in steps] == [
        (0, 4, False),
        (4, 4, False),
        (8, 2, True),
        (10, 1, True),
    ]


def test_decoding_comes_before_prompt_chunks() -> None:
    scheduler = make_scheduler(max_num_step_tokens=8)
    scheduler.add(make_request("long", 20))
    assert run_step(scheduler).num_new_tokens == {"long": 8}
    scheduler.abort("long")
    scheduler.add_all([make_request("short", 2), make_request("long", 20)])
    plans = [run_step(scheduler) for _ in range(4)]
    assert [list(plan.num_new_tokens.items()) for plan in plans] == [
        [("short", 2), ("long", 6)],
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 7)],
        [("short", 1), ("long", 1)],
    ]


def test_a_sampled_code_and_its_forced_end_are_computed_together() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 3)
    scheduler.add(request)
    run_step(scheduler, sampled={"a": [50, 51]})
    assert request.num_tokens - request.num_computed_tokens == 2
    plan = run_step(scheduler)
    assert [(r.start, r.num_new_tokens, r.samples) for r in plan.requests] == [(3, 2, True)]


def test_forced_opening_tokens_are_computed_with_the_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 3, forced=[9]))
    assert scheduler.num_waiting_tokens == 3
    assert run_step(scheduler).num_new_tokens == {"a": 4}


def test_every_running_request_moves_even_when_all_need_more_than_the_step_has() -> None:
    scheduler = make_scheduler(max_num_step_tokens=4)
    scheduler.add_all([make_request(name, 1) for name in "abcd"])
    run_step(scheduler, sampled={name: [50, 51] for name in "abcd"})  # two missing tokens each
    plan = run_step(scheduler)
    assert plan.num_new_tokens == dict.fromkeys("abcd", 1)
    assert not any(r.samples for r in plan.requests)


def test_no_more_requests_run_than_a_step_has_tokens() -> None:
    scheduler = make_scheduler(max_num_requests=8, max_num_step_tokens=3)
    scheduler.add_all([make_request(name, 1) for name in "abcde"])
    assert run_step(scheduler).num_new_tokens == {"a": 1, "b": 1, "c": 1}
    plan = run_step(scheduler, finished=["b"])
    assert plan.num_new_tokens == {"a": 1, "b": 1, "c": 1}
    assert run_step(scheduler).num_new_tokens == {"a": 1, "c": 1, "d": 1}


def test_max_num_requests_is_kept() -> None:
    scheduler = make_scheduler(max_num_requests=2)
    scheduler.add_all([make_request(name, 1) for name in "abc"])
    assert list(run_step(scheduler, finished=["a"]).num_new_tokens) == ["a", "b"]
    assert list(run_step(scheduler).num_new_tokens) == ["b", "c"]


def test_admission_waits_for_the_worst_case_and_lets_nobody_pass() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=4)
    scheduler.add(make_request("a", 4, max_tokens=8))  # 3 blocks
    scheduler.add(make_request("big", 4, max_tokens=8))  # 3 blocks: 2 are left
    scheduler.add(make_request("small", 1, max_tokens=3))  # would fit
    assert list(run_step(scheduler).num_new_tokens) == ["a"]
    assert list(run_step(scheduler, finished=["a"]).num_new_tokens) == ["a"]
    assert list(run_step(scheduler).num_new_tokens) == ["big", "small"]


def test_an_expert_choice_prompt_is_computed_whole_or_not_at_all() -> None:
    scheduler = make_scheduler(max_num_step_tokens=8)
    scheduler.add_all([make_request("a", 3), make_request("w", 6, whole=True)])
    scheduler.add(make_request("c", 1))
    assert run_step(scheduler).num_new_tokens == {"a": 3}  # 5 left: w waits, c does not pass
    assert run_step(scheduler).num_new_tokens == {"a": 1, "w": 6, "c": 1}


def test_an_expert_choice_prompt_that_needs_a_whole_step_does_not_starve() -> None:
    scheduler = make_scheduler(max_num_step_tokens=8)
    scheduler.add_all([make_request("a", 3), make_request("w", 8, whole=True)])
    scheduler.add(make_request("c", 1))
    run_step(scheduler)
    assert run_step(scheduler, finished=["a"]).num_new_tokens == {"a": 1}
    assert run_step(scheduler).num_new_tokens == {"w": 8}
    assert run_step(scheduler).num_new_tokens == {"w": 1, "c": 1}


def test_only_the_prompt_must_be_whole_not_the_forced_tokens_after_it() -> None:
    scheduler = make_scheduler(max_num_step_tokens=8)
    scheduler.add(make_request("w", 8, whole=True, forced=[9]))
    plans = [run_step(scheduler), run_step(scheduler)]
    assert [(p.requests[0].num_new_tokens, p.requests[0].samples) for p in plans] == [
        (8, False),
        (1, True),
    ]


def test_abort_of_a_waiting_a_running_and_an_unknown_request() -> None:
    scheduler = make_scheduler(max_num_requests=1)
    requests = [make_request("a", 4), make_request("b", 5)]
    scheduler.add_all(requests)
    run_step(scheduler)
    for name in "ba":
        assert scheduler.abort(name)
        scheduler.check()
        assert not scheduler.abort(name)
    assert all(r.status is RequestStatus.FINISHED for r in requests)
    assert not scheduler.has_work
    assert scheduler.num_waiting_tokens == 0
    assert scheduler.kv_cache.num_free_blocks == scheduler.kv_cache.num_blocks


@pytest.mark.parametrize("finished", [(), ("a",)], ids=["going on", "in its last step"])
def test_abort_between_schedule_and_update(finished: tuple[str, ...]) -> None:
    scheduler = make_scheduler()
    requests = [make_request("a"), make_request("b")]
    scheduler.add_all(requests)
    plan = scheduler.schedule()
    assert scheduler.abort("a")
    scheduler.check()
    scheduler.update(plan, {"a": [20], "b": [21]}, finished)
    scheduler.check()
    assert requests[0].output_token_ids == []
    assert requests[1].output_token_ids == [21]
    assert list(scheduler.requests) == ["b"]


def test_an_id_added_again_during_the_step_is_not_taken_for_the_aborted_one() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4))
    plan = scheduler.schedule()
    scheduler.abort("a")
    again = make_request("a", 6)
    scheduler.add(again)
    scheduler.update(plan, {"a": [20]}, ["a"])
    scheduler.check()
    assert again.status is RequestStatus.WAITING
    assert again.output_token_ids == []
    assert run_step(scheduler).num_new_tokens == {"a": 6}


def test_finishing_without_a_token() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4, max_tokens=0)
    scheduler.add(request)
    plan = scheduler.schedule()
    scheduler.update(plan, {}, {"a"})
    scheduler.check()
    assert request.output_token_ids == []
    assert not scheduler.has_work


def test_a_request_that_sampled_nothing_and_does_not_end_is_our_bug() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4))
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match="4 of 4 tokens"):
        scheduler.update(plan, {}, ())


def test_a_token_for_a_request_that_did_not_sample_is_our_bug() -> None:
    scheduler = make_scheduler(max_num_step_tokens=4)
    scheduler.add(make_request("a", 8))
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match="did not sample"):
        scheduler.update(plan, {"a": [20]}, ())


def test_the_queue_is_capped_in_requests() -> None:
    scheduler = make_scheduler(max_num_requests=1, max_queued_requests=2)
    scheduler.add_all([make_request("a"), make_request("b")])
    with pytest.raises(QueueFullError, match="holds 2 requests; 1 more .* limit of 2") as caught:
        scheduler.add(make_request("c"))
    assert caught.value.retry_after_s == RETRY_AFTER_S
    run_step(scheduler)  # a leaves the queue
    with pytest.raises(QueueFullError):
        scheduler.add_all([make_request("c"), make_request("d")])
    assert list(scheduler.requests) == ["a", "b"]  # all or nothing
    scheduler.add(make_request("c"))
    scheduler.check()


def test_the_queue_is_capped_in_prompt_tokens() -> None:
    scheduler = make_scheduler(max_queued_tokens=10)
    scheduler.add(make_request("a", 6))
    with pytest.raises(QueueFullError, match="holds 6 tokens; 5 more .* limit of 10"):
        scheduler.add(make_request("b", 5))
    scheduler.add(make_request("b", 4))
    scheduler.abort("a")
    assert scheduler.num_waiting_tokens == 4
    scheduler.add(make_request("c", 6))
    scheduler.check()


def test_what_exceeds_even_an_empty_queue_is_not_told_to_retry() -> None:
    scheduler = make_scheduler(max_queued_requests=2, max_queued_tokens=10)
    with pytest.raises(RequestError, match=r"3 requests .* more than 2 \(max_queued_requests\)"):
        scheduler.add_all([make_request(name, 1) for name in "abc"])
    with pytest.raises(RequestError, match=r"12 tokens .* more than 10 \(max_queued_tokens\)"):
        scheduler.add_all([make_request(name, 6) for name in "ab"])
    assert not scheduler.has_work


def test_an_id_in_use_is_refused() -> None:
    scheduler = make_scheduler(max_num_requests=1)
    scheduler.add_all([make_request("a"), make_request("b")])
    run_step(scheduler)
    for name in "ab":
        with pytest.raises(RequestError, match=f"'{name}' is already in use") as caught:
            scheduler.add_all([make_request("c"), make_request(name)])
        assert caught.value.param == "request_id"
    assert list(scheduler.requests) == ["a", "b"]


def test_requests_is_read_only() -> None:
    with pytest.raises(TypeError):
        make_scheduler().requests["a"] = make_request("a")  # type: ignore[index]


def test_check_fits_names_the_numbers() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_step_tokens=8)
    scheduler.check_fits(16, False, 16)
    scheduler.check_fits(16, True, 8)
    with pytest.raises(PromptError, match="17 tokens .* need 5 KV blocks of 4 .* has 4"):
        scheduler.check_fits(17, False, 1)
    with pytest.raises(PromptError, match="expert_choice .* at most 8 tokens .* got 9"):
        scheduler.check_fits(16, True, 9)
    with pytest.raises(PromptError, match="at least 1 token, got 0"):
        scheduler.check_fits(16, False, 0)


def test_a_request_that_never_fits_is_refused_when_added() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_step_tokens=8)
    never = [
        make_request("n", 9, max_tokens=8),
        make_request("n", 9, max_tokens=1, whole=True),
        make_request("n", 0),
    ]
    for request in never:
        with pytest.raises(PromptError):
            scheduler.add_all([make_request("a"), request])
    assert not scheduler.has_work
