"""Exact examples of scheduling: what a step computes, who starts, who is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from momaserve.core.plan import OWN, PlannedSequence
from momaserve.core.waiting import RETRY_AFTER_S
from momaserve.errors import PromptError, QueueFullError, RequestError
from momaserve.request import RequestStatus
from tests.core.factory import make_request, make_samples, make_scheduler, run_step, spans


def test_core_imports_no_torch() -> None:
    code = "import sys, momaserve.core.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_idle_scheduler_plans_nothing() -> None:
    scheduler = make_scheduler()
    assert not scheduler.has_work
    assert scheduler.schedule().sequences == ()
    assert scheduler.schedule().num_tokens == 0


def test_one_request_from_prompt_to_finish() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    request = make_request("a", [10, 11, 12, 13], max_tokens=4)
    scheduler.add_all([request])
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (1, 4)

    prompt = run_step(scheduler, sampled={"a": [20]})
    assert spans(prompt) == [("a", OWN, 0, 4)]
    assert prompt.samples == ("a",)
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)
    assert scheduler.num_waiting_tokens == 0
    assert str(request.status) == "running"

    decode = run_step(scheduler, sampled={"a": [21]}, finished=["a"])
    assert decode.sequences == (PlannedSequence("a", OWN, 4, 1, [0, 1], []),)
    assert decode.num_tokens == 1
    assert str(request.status) == "finished"
    assert request.output_token_ids == [20, 21]
    assert not scheduler.has_work
    assert scheduler.kv_cache.usage == 0.0


def test_a_long_prompt_is_computed_in_chunks_and_samples_once() -> None:
    scheduler = make_scheduler(max_num_step_tokens=4)
    scheduler.add_all([make_request("a", 10)])
    plans = [run_step(scheduler) for _ in range(4)]
    assert [(*spans(plan)[0][2:], plan.samples) for plan in plans] == [
        (0, 4, ()),
        (4, 4, ()),
        (8, 2, ("a",)),
        (10, 1, ("a",)),
    ]


def test_decoding_comes_before_prompt_chunks() -> None:
    scheduler = make_scheduler(max_num_step_tokens=8)
    scheduler.add_all([make_request("short", 2), make_request("long", 20)])
    plans = [run_step(scheduler) for _ in range(4)]
    assert [plan.num_new_tokens for plan in plans] == [
        {"short": 2, "long": 6},
        {"short": 1, "long": 7},
        {"short": 1, "long": 7},
        {"short": 1, "long": 1},
    ]


def test_a_sampled_token_and_a_forced_one_are_computed_together() -> None:
    scheduler = make_scheduler()
    scheduler.add_all([make_request("a", 3)])
    run_step(scheduler, sampled={"a": [50, 51]})
    plan = run_step(scheduler)
    assert spans(plan) == [("a", OWN, 3, 2)]
    assert plan.samples == ("a",)


def test_forced_opening_tokens_are_computed_with_the_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add_all([make_request("a", 3, forced=[9])])
    assert scheduler.num_waiting_tokens == 3
    assert run_step(scheduler).num_new_tokens == {"a": 4}


def test_every_running_request_moves_even_when_all_need_more_than_the_step_has() -> None:
    scheduler = make_scheduler(max_num_step_tokens=4)
    scheduler.add_all([make_request(name, 1) for name in "abcd"])
    run_step(scheduler, sampled={name: [50, 51] for name in "abcd"})  # two missing tokens each
    plan = run_step(scheduler)
    assert plan.num_new_tokens == dict.fromkeys("abcd", 1)
    assert plan.samples == ()


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


def test_the_oldest_waiting_request_starts_first_and_lets_nobody_pass() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    scheduler.add_all([make_request("a", 12, max_tokens=4)])
    scheduler.add_all([make_request("big", 12, max_tokens=4), make_request("small", 1)])
    assert run_step(scheduler).num_new_tokens == {"a": 12}
    assert run_step(scheduler, finished=["a"]).num_new_tokens == {"a": 1}
    assert run_step(scheduler).num_new_tokens == {"big": 12, "small": 1}


def test_smaller_priorities_start_first() -> None:
    scheduler = make_scheduler(max_num_requests=1)
    priorities = {"a": 0, "b": 5, "c": 0, "d": -5}
    scheduler.add_all([make_request(name, 1, priority=p) for name, p in priorities.items()])
    order = [run_step(scheduler, finished=[*"abcd"]).samples for _ in range(4)]
    assert order == [("d",), ("a",), ("c",), ("b",)]


def test_a_request_starts_with_room_for_its_known_tokens_and_a_block_for_each_that_runs() -> None:
    """Two run, and 4 + 1 tokens need 2 blocks: 4 must be free, 3 are not enough."""
    for num_blocks, starts in ((7, False), (8, True)):
        scheduler = make_scheduler(num_blocks=num_blocks, block_size=4)
        scheduler.add_all([make_request("a", 4), make_request("b", 4)])
        run_step(scheduler)
        run_step(scheduler)
        assert scheduler.kv_cache.num_free_blocks == num_blocks - 4
        scheduler.add_all([make_request("c", 4)])
        assert ("c" in run_step(scheduler).num_new_tokens) is starts


def test_a_request_that_is_alone_starts_in_a_cache_it_fills() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    scheduler.add_all([make_request("a", 4, max_tokens=4)])
    plans = [run_step(scheduler) for _ in range(3)]
    assert [plan.num_tokens for plan in plans] == [4, 1, 1]


def test_an_expert_choice_prompt_is_computed_whole_or_not_at_all() -> None:
    scheduler = make_scheduler(max_num_step_tokens=8)
    scheduler.add_all([make_request("a", 3), make_request("w", 6, whole=True)])
    scheduler.add_all([make_request("c", 1)])
    assert run_step(scheduler).num_new_tokens == {"a": 3}  # 5 left: w waits, c does not pass
    assert run_step(scheduler).num_new_tokens == {"a": 1, "w": 6, "c": 1}


def test_an_expert_choice_prompt_that_needs_a_whole_step_does_not_starve() -> None:
    scheduler = make_scheduler(max_num_step_tokens=8)
    scheduler.add_all([make_request("a", 3), make_request("w", 8, whole=True)])
    scheduler.add_all([make_request("c", 1)])
    run_step(scheduler)
    assert run_step(scheduler, finished=["a"]).num_new_tokens == {"a": 1}
    assert run_step(scheduler).num_new_tokens == {"w": 8}
    assert run_step(scheduler).num_new_tokens == {"w": 1, "c": 1}


def test_only_the_prompt_must_be_whole_not_the_forced_tokens_after_it() -> None:
    scheduler = make_scheduler(max_num_step_tokens=8)
    scheduler.add_all([make_request("w", 8, whole=True, forced=[9])])
    plans = [run_step(scheduler), run_step(scheduler)]
    assert [(plan.num_tokens, plan.samples) for plan in plans] == [(8, ()), (1, ("w",))]


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
    scheduler.add_all([make_request("a", 4)])
    plan = scheduler.schedule()
    scheduler.abort("a")
    again = make_request("a", range(6))
    scheduler.add_all([again])
    scheduler.update(plan, {"a": [20]}, ["a"])
    scheduler.check()
    assert again.status is RequestStatus.WAITING
    assert again.output_token_ids == []
    assert run_step(scheduler).num_new_tokens == {"a": 6}


def test_finishing_without_a_token() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 4, max_tokens=0)
    scheduler.add_all([request])
    scheduler.update(scheduler.schedule(), {}, {"a"})
    scheduler.check()
    assert request.output_token_ids == []
    assert not scheduler.has_work


def test_a_request_that_sampled_nothing_and_does_not_end_is_our_bug() -> None:
    scheduler = make_scheduler()
    scheduler.add_all([make_request("a", 4)])
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match="all of 4 tokens are computed"):
        scheduler.update(plan, {}, ())


def test_more_tokens_than_were_asked_for_are_our_bug() -> None:
    scheduler = make_scheduler()
    scheduler.add_all([make_request("a", 4, max_tokens=1)])
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match="6 tokens exceed 5"):
        scheduler.update(plan, {"a": [7, 7]}, ())


def test_a_token_for_a_request_that_did_not_sample_is_our_bug() -> None:
    scheduler = make_scheduler(max_num_step_tokens=4)
    scheduler.add_all([make_request("a", 8)])
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match="did not sample"):
        scheduler.update(plan, {"a": [20]}, ())


def test_the_queue_is_capped_in_requests() -> None:
    scheduler = make_scheduler(max_num_requests=1, max_queued_requests=2)
    scheduler.add_all([make_request("a"), make_request("b")])
    with pytest.raises(QueueFullError, match="holds 2 requests; 1 more .* limit of 2") as caught:
        scheduler.add_all([make_request("c")])
    assert caught.value.retry_after_s == RETRY_AFTER_S
    run_step(scheduler)  # a leaves the queue
    with pytest.raises(QueueFullError):
        scheduler.add_all([make_request("c"), make_request("d")])
    assert list(scheduler.requests) == ["a", "b"]  # all or nothing
    scheduler.add_all([make_request("c")])
    scheduler.check()


def test_the_queue_is_capped_in_prompt_tokens() -> None:
    scheduler = make_scheduler(max_queued_tokens=10)
    scheduler.add_all([make_request("a", 6)])
    with pytest.raises(QueueFullError, match="holds 6 tokens; 5 more .* limit of 10"):
        scheduler.add_all([make_request("b", 5)])
    scheduler.add_all([make_request("b", 4)])
    scheduler.abort("a")
    assert scheduler.num_waiting_tokens == 4
    scheduler.add_all(make_samples("cd", 3))
    assert scheduler.num_waiting_tokens == 10
    scheduler.check()


def test_what_exceeds_even_an_empty_queue_is_not_told_to_retry() -> None:
    scheduler = make_scheduler(max_queued_requests=2, max_queued_tokens=10)
    with pytest.raises(RequestError, match=r"3 requests .* 2 \(max_queued_requests\)"):
        scheduler.add_all([make_request(name, 1) for name in "abc"])
    with pytest.raises(RequestError, match=r"12 tokens .* 10 \(max_queued_tokens\)"):
        scheduler.add_all([make_request(name, 6) for name in "ab"])
    assert not scheduler.has_work
    scheduler.check_submission(2, 10)
    for too_much in ((3, 10), (2, 11)):
        with pytest.raises(RequestError):
            scheduler.check_submission(*too_much)


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


def test_check_fits_names_the_numbers_of_the_cache() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.check_fits(make_request("a", 8, max_tokens=8))
    with pytest.raises(PromptError, match="17 tokens .* 5 KV blocks of 4 .* has 4"):
        scheduler.check_fits(make_request("a", 8, max_tokens=9))
    scheduler.check_fits(make_request("a", 4, max_tokens=4, num_companions=1, num_codes=6))
    with pytest.raises(PromptError, match="9 tokens .* 1 x 8 of guidance .* 5 KV blocks"):
        scheduler.check_fits(make_request("a", 4, max_tokens=5, num_companions=1, num_codes=6))
    with pytest.raises(PromptError, match="8 tokens .* 2 x 8 of guidance .* 6 KV blocks"):
        scheduler.check_fits(make_request("a", 4, max_tokens=4, num_companions=2, num_codes=6))


def test_check_fits_names_the_numbers_of_a_prompt_that_must_be_whole() -> None:
    scheduler = make_scheduler(max_num_step_tokens=8)
    scheduler.check_fits(make_request("a", 9))
    scheduler.check_fits(make_request("a", 8, whole=True, forced=[1]))
    with pytest.raises(PromptError, match="expert_choice .* at most 8 tokens .* got 9"):
        scheduler.check_fits(make_request("a", 9, whole=True))
    scheduler.check_fits(make_request("a", 6, whole=True, num_companions=1, in_picture=True))
    with pytest.raises(PromptError, match="expert_choice .* at most 8 tokens .* got 9"):
        scheduler.check_fits(make_request("a", 7, whole=True, num_companions=1, in_picture=True))
    # Behind a forced token the companions come a step later, and the prompt may fill its own.
    request = make_request("a", 8, whole=True, forced=[1], num_companions=1, in_picture=True)
    scheduler.check_fits(request)


@pytest.mark.parametrize("limit", ["max_num_requests", "max_num_step_tokens"])
def test_check_fits_names_the_numbers_of_guidance(limit: str) -> None:
    scheduler = make_scheduler(**{limit: 2})  # type: ignore[arg-type]
    scheduler.check_fits(make_request("a", num_companions=1))
    with pytest.raises(RequestError, match=rf"3 sequences .* at most 2 may run \({limit}\)") as got:
        scheduler.check_fits(make_request("a", num_companions=2))
    assert got.value.param == "guidance_scale"


def test_a_request_that_never_fits_is_refused_when_added() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_step_tokens=8)
    never = [
        make_request("n", 9, max_tokens=8),
        make_request("n", 9, max_tokens=1, whole=True),
        make_request("n", 4, max_tokens=4, num_companions=3),
    ]
    for request in never:
        with pytest.raises(PromptError):
            scheduler.add_all([make_request("a"), request])
    assert not scheduler.has_work


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(PromptError, match="at least 1 token, got 0"):
        make_scheduler().add_all([make_request("a", 0)])
