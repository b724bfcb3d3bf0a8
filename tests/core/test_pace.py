"""Steps that prompts fill up to a predicted time, and what they hold however long it takes."""

from __future__ import annotations

import pytest

from momaserve.core.scheduler import Scheduler
from tests.core.factory import make_forecast, make_request, make_scheduler, run_step, run_until
from tests.core.slow_model import BEGIN

# With the forecast of the factory a step reads 80 bytes of attention, up to 800 of experts of
# one modality, 60 of the head and 4 for each token that a row sees; a byte takes a second.


def paced(
    target_s: float | None, *, max_num_step_tokens: int = 64, block_size: int = 4
) -> Scheduler:
    return make_scheduler(
        num_blocks=256,
        max_num_step_tokens=max_num_step_tokens,
        step_time_target_ms=None if target_s is None else 1000 * target_s,
        forecast=make_forecast(),
        block_size=block_size,
    )


def chunks(scheduler: Scheduler, name: str) -> list[int]:
    """Tokens of a prompt in each step until it samples."""
    counts: list[int] = []
    while not scheduler.requests[name].num_output_tokens:
        counts.append(run_step(scheduler).num_new_tokens.get(name, 0))
    return counts


def test_without_a_target_a_prompt_takes_what_there_is() -> None:
    scheduler = paced(None)
    scheduler.add_all([make_request("a", 100)])
    assert chunks(scheduler, "a") == [64, 36]


@pytest.mark.parametrize("target_s", [1000.0, 1200.0, 1400.0])
def test_chunks_end_before_the_target(target_s: float) -> None:
    scheduler = paced(target_s)
    scheduler.add_all([make_request("a", 100)])
    predicted = []
    while not scheduler.requests["a"].num_output_tokens:
        plan = run_step(scheduler)
        assert plan.predicted_s is not None
        predicted.append((plan.predicted_s, plan.num_tokens))
    least = 1 + 4  # a token for the request, and a block behind it
    assert all(seconds <= target_s for seconds, tokens in predicted if tokens > least)
    assert all(tokens >= 4 for _, tokens in predicted[:-1])
    assert len(predicted) > 2


def test_a_longer_target_takes_longer_chunks() -> None:
    steps = []
    for target_s in (900.0, 1000.0, 1100.0, 1e6):
        scheduler = paced(target_s)
        scheduler.add_all([make_request("a", 100)])
        steps.append(len(chunks(scheduler, "a")))
    assert steps == sorted(steps, reverse=True)
    assert steps[0] > steps[-1] == 2


def test_a_prompt_gets_a_block_however_long_that_takes() -> None:
    scheduler = paced(0.001)
    scheduler.add_all([make_request("a", 10)])
    assert chunks(scheduler, "a") == [4, 5, 1]  # once it runs, a token is its own


def test_decoding_goes_on_beside_a_prompt() -> None:
    scheduler = paced(0.001)
    scheduler.add_all([make_request("a", 2), make_request("b", 2)])
    run_step(scheduler)
    scheduler.add_all([make_request("c", 12)])
    for count in (4, 5, 3):
        assert run_step(scheduler).num_new_tokens == {"a": 1, "b": 1, "c": count}


def test_steps_without_prompts_know_no_target() -> None:
    scheduler = paced(0.001)
    scheduler.add_all([make_request(name, 4) for name in "abc"])
    run_until(scheduler, lambda: all(r.num_output_tokens for r in scheduler.requests.values()))
    assert run_step(scheduler).num_new_tokens == {"a": 1, "b": 1, "c": 1}


def test_a_prompt_that_must_be_whole_is_not_cut() -> None:
    scheduler = paced(0.001)
    scheduler.add_all([make_request("a", 30, whole=True), make_request("b", 9)])
    plan = run_step(scheduler)
    assert plan.num_new_tokens == {"a": 30}
    assert run_step(scheduler).num_new_tokens == {"a": 1, "b": 4}


def test_a_whole_prompt_waits_for_a_step_that_has_room() -> None:
    scheduler = paced(0.001, max_num_step_tokens=32)
    scheduler.add_all([make_request("a", 3)])
    run_step(scheduler)
    scheduler.add_all([make_request("b", 32, whole=True)])
    assert run_step(scheduler).num_new_tokens == {"a": 1}
    plan = run_step(scheduler, finished="a")
    assert plan.num_new_tokens == {"a": 1}
    assert run_step(scheduler).num_new_tokens == {"b": 32}


def test_the_last_tokens_of_a_guided_request_are_not_cut() -> None:
    """A block has room for one token, and the step that samples needs two."""
    scheduler = paced(0.001, block_size=1)
    scheduler.add_all([make_request("a", [BEGIN], num_companions=1, in_picture=True)])
    run_until(scheduler, lambda: scheduler.requests["a"].num_output_tokens)


def test_a_slower_machine_gets_shorter_chunks() -> None:
    """The cost model has learnt that reading takes four times as long."""
    forecast = make_forecast()
    sizes = []
    for _ in range(2):
        scheduler = make_scheduler(
            num_blocks=256,
            max_num_step_tokens=64,
            step_time_target_ms=1.3e6,
            forecast=forecast,
        )
        scheduler.add_all([make_request("a", 100)])
        plan = scheduler.schedule()
        sizes.append(plan.num_tokens)
        for _ in range(100):
            assert plan.load is not None
            forecast.cost_model.observe(plan.load, 4e3, 1.0)
    assert sizes[1] == 4 < sizes[0]
