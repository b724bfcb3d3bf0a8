"""Steps that are planned before the last one is known change nothing but when things happen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from momaserve.core.plan import StepPlan
from momaserve.engine import Engine
from momaserve.outputs import FinishReason
from momaserve.request import Request
from momaserve.tokens.prompt import Prompt
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import BEGIN_IMAGE, BOS, EOS, Recorder, make_engine
from tests.engine.work import (
    PICTURE,
    PROMPT_POLICIES,
    SHAPES,
    WAYS,
    Alone,
    Answer,
    Ask,
    ask,
    assert_all_equal,
    assert_equal,
    cache_of,
    in_turn,
    make_asks,
    run,
)

LONG = (BOS, 30, 31, *PICTURE, 32, 33, 34, 35, 36, 37)


def both(checkpoint_for: CheckpointFor, case: str, **options: Any) -> list[Engine]:
    """An engine that plans ahead, and one that does not."""
    return [
        make_engine(checkpoint_for(case), plan_ahead=plan_ahead, **options)
        for plan_ahead in (True, False)
    ]


# --- equality ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHAPES)
def test_ahead_equals_alone(checkpoint_for: CheckpointFor, alone: Alone, case: str) -> None:
    """In a batch, among arrivals, on a warm cache, in chunks, and with samples."""
    asks = in_turn(
        make_asks(checkpoint_for(case), 10, first=50), n=[1, 2, 1], prompt_routing=PROMPT_POLICIES
    )
    wanted = alone(case, asks)
    engine = make_engine(checkpoint_for(case), plan_ahead=True)
    for per_step in (1, None):
        assert_all_equal(run(engine, asks, per_step=per_step), wanted)
    few = make_engine(
        checkpoint_for(case), plan_ahead=True, max_num_requests=3, max_num_step_tokens=48
    )
    assert_all_equal(run(few, asks[:5]), wanted[:5])


@pytest.mark.parametrize("step_tokens", [2, 3, 16])
def test_ahead_in_chunks(checkpoint_for: CheckpointFor, alone: Alone, step_tokens: int) -> None:
    asks = in_turn(make_asks(checkpoint_for("depth_4t4i_post"), 8), n=[1, 3])
    engine = make_engine(
        checkpoint_for("depth_4t4i_post"), plan_ahead=True, max_num_step_tokens=step_tokens
    )
    assert_all_equal(run(engine, asks, per_step=2), alone("depth_4t4i_post", asks))


@pytest.mark.parametrize("case", SHAPES)
def test_ahead_with_preemptions(checkpoint_for: CheckpointFor, alone: Alone, case: str) -> None:
    """Also of requests whose token is in flight."""
    asks = in_turn(
        make_asks(checkpoint_for(case), 7),
        n=[1, 3, 1, 2],
        prompt_routing=PROMPT_POLICIES,
        max_tokens=[16, 24, 12],
    )
    checkpoint = checkpoint_for(case)
    engine = make_engine(checkpoint, plan_ahead=True, **cache_of(checkpoint, 15))
    engine.listener = listener = Recorder()
    assert_all_equal(run(engine, asks), alone(case, asks))
    assert sum(step.num_preemptions for step in listener.steps) > 0


def test_steps_are_really_planned_ahead(checkpoint_for: CheckpointFor) -> None:
    """A token that is being sampled is computed in the next step; no step is idle for it."""
    for engine in both(checkpoint_for, "4t4i_post"):
        engine.listener = listener = Recorder()
        run(engine, [ask((BOS, 30), max_tokens=9), ask((BOS, 31), mode="image")])
        assert [step.num_tokens for step in listener.steps] == [5, 2, 2, 2, 1, 1, 1, 1, 1]
        unknown = count_unknown(engine)
        run(engine, [ask((BOS, 40), max_tokens=6)])
        assert unknown == ([0, 1, 1, 1, 1, 1] if engine.config.plan_ahead else [0] * 6)


def count_unknown(engine: Engine) -> list[int]:
    """The list that is told, for each step, how many of its tokens nobody knows yet."""
    unknown: list[int] = []
    execute = engine._runner.execute

    def counted(plan: StepPlan, requests: Mapping[str, Request], *args: Any, **fields: Any) -> Any:
        stops = {s.request_id: s.start + s.num_new_tokens for s in plan.sequences}
        unknown.append(sum(stop > requests[name].num_tokens for name, stop in stops.items()))
        return execute(plan, requests, *args, **fields)

    engine._runner.execute = counted  # type: ignore[method-assign]
    return unknown


# --- ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_ahead_of_a_stop(checkpoint_for: CheckpointFor, mode: str) -> None:
    """The token after the last one is computed for nothing, and leaves no trace."""
    fields: dict[str, Any] = {
        "mode": mode,
        "max_tokens": 14,
        "text": WAYS[1],
        "logit_bias": {BEGIN_IMAGE: 5.0, EOS: 3.0},
        "ignore_eos": False,
    }
    asks = [
        ask((BOS, 30 + i % 4, 31), seed=i, stop_token_ids=(40 + i, 50 + i), **fields)
        for i in range(10)
    ]
    ahead, plain = both(checkpoint_for, "4t4i_post", max_num_requests=4)
    wanted = run(plain, asks)
    assert_all_equal(run(ahead, asks), wanted)
    reasons = [answer.finish_reason for (answer,) in wanted]
    assert FinishReason.STOP in reasons
    # What the stopped ones left in the cache is right.
    again = [
        ask((*one.prompt, *answer.token_ids, 60, 61, 62), max_tokens=3)
        for one, (answer,) in zip(asks, wanted, strict=True)
        if not answer.token_ids or answer.token_ids[-1] not in range(4, 20)
    ]
    assert len(again) > 5
    assert_all_equal(run(ahead, again), run(plain, again))


@pytest.mark.parametrize("seed", range(4))
def test_aborts_while_a_step_is_in_flight(
    checkpoint_for: CheckpointFor, alone: Alone, seed: int
) -> None:
    """And a new request with the name of the aborted one, at once."""
    case = ["4t4i_post", "depth_4t4i_post"][seed % 2]
    asks = in_turn(make_asks(checkpoint_for(case), 9, first=20 + seed), n=[1, 2])
    engine = make_engine(checkpoint_for(case), plan_ahead=True, max_num_step_tokens=64)
    wanted = alone(case, asks)
    names = {
        f"r{index}" if one.params.n == 1 else f"r{index}-{choice}": answer
        for index, (one, group) in enumerate(zip(asks, wanted, strict=True))
        for choice, answer in enumerate(group)
    }
    ended: set[str] = set()

    def abort(step: int) -> None:
        running = [r for r in engine.scheduler.requests if r in names]
        if running and step % 3 == seed % 3:
            name = running[(7 * step + seed) % len(running)]
            ended.add(name)
            assert engine.abort(name)
            assert not engine.abort(name)
            engine.scheduler.check()

    answers = run(engine, asks, per_step=1, between=abort)
    assert len(ended) >= 3
    got = [answer for group in answers for answer in group]
    for name, answer in zip(names, got, strict=True):
        if name in ended:
            assert answer.token_ids == names[name].token_ids[: len(answer.token_ids)]
        else:
            assert_equal(answer, names[name])
    assert_all_equal(run(engine, asks), wanted)  # what they left in the cache is right


def test_a_name_is_used_again_while_its_step_is_in_flight(
    checkpoint_for: CheckpointFor, alone: Alone
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), plan_ahead=True)
    first, second = ask((BOS, 30, 31), max_tokens=9), ask((BOS, 40, 41, 42), max_tokens=7)
    engine.add(engine.make_submission(Prompt(first.prompt), first.params, "r"))
    for _ in range(3):
        engine.step()
    assert engine.abort("r")
    engine.add(engine.make_submission(Prompt(second.prompt), second.params, "r"))
    answer = Answer()
    while engine.has_work:
        for output in engine.step():
            answer.take(output)
        engine.scheduler.check()
    assert_all_equal([[answer]], alone("4t4i_post", [second]))


# --- steps that fail -----------------------------------------------------------------------


def fail_step(engine: Engine, number: int, *, late: bool) -> Callable[[], None]:
    """Makes one step write nothing and fail: at its start, or when its result is waited for.

    Returns:
        What mends the engine.
    """
    execute, storage, count = engine._runner.execute, engine._runner.storage, 0

    def broken() -> Any:
        raise MemoryError

    def failing(*args: Any, **fields: Any) -> Any:
        nonlocal count
        count += 1
        if count != number:
            return execute(*args, **fields)
        if not late:
            broken()
        before = storage.k.clone(), storage.v.clone()
        step = execute(*args, **fields)
        storage.k.copy_(before[0])
        storage.v.copy_(before[1])
        step.result = broken  # type: ignore[method-assign]
        return step

    def mend() -> None:
        engine._runner.execute = execute  # type: ignore[method-assign]

    engine._runner.execute = failing  # type: ignore[method-assign]
    return mend


def assert_survivors(answers: list[list[Answer]], wanted: list[list[Answer]]) -> int:
    """What did not end with an error is right; returns how many did."""
    num_failed = 0
    for got, expected in zip(answers, wanted, strict=True):
        for one, other in zip(got, expected, strict=True):
            if one.finish_reason is FinishReason.ERROR:
                num_failed += 1
                assert one.token_ids == other.token_ids[: len(one.token_ids)]
            else:
                assert_equal(one, other)
    return num_failed


def shared_prompts() -> list[Ask]:
    """Requests that find each other's blocks while they are being computed."""
    asks = [ask((*LONG, 40 + i), max_tokens=6, seed=i, text=WAYS[1]) for i in range(3)]
    asks.append(ask(LONG, mode="image", guidance_scale=2.0, n=2, image=WAYS[1]))
    asks.append(ask((*LONG[:9], 50, 51, 52, 53, 54), max_tokens=5))
    return asks


@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize(
    ("plan_ahead", "late"),
    [(False, False), (True, False), (True, True)],
    ids=["plain", "ahead", "in flight"],
)
def test_a_failed_step_spoils_nobody_elses_answer(
    checkpoint_for: CheckpointFor, alone: Alone, number: int, plan_ahead: bool, late: bool
) -> None:
    """Nobody uses blocks that it was to fill: neither the step after it, nor those who come."""
    asks = shared_prompts()
    wanted = alone("4t4i_post", asks)
    engine = make_engine(
        checkpoint_for("4t4i_post"),
        plan_ahead=plan_ahead,
        max_num_step_tokens=8,
        max_num_requests=4,
    )
    mend = fail_step(engine, number, late=late)
    assert assert_survivors(run(engine, asks), wanted) > 0
    mend()
    for _ in range(2):
        assert_all_equal(run(engine, asks), wanted)


def test_the_prompt_of_a_failed_step_is_not_found_in_the_next(
    checkpoint_for: CheckpointFor, alone: Alone
) -> None:
    """Two requests with one prompt; the step of the first fails before the second starts."""
    asks = [ask((BOS, *range(30, 41)), max_tokens=6)] * 2
    wanted = alone("4t4i_post", asks)
    engine = make_engine(checkpoint_for("4t4i_post"), plan_ahead=True, max_num_step_tokens=8)
    mend = fail_step(engine, 1, late=False)
    assert assert_survivors(run(engine, asks), wanted) >= 1
    mend()
    longer = [asks[0], ask((*asks[0].prompt, 50, 51, 52), max_tokens=6)]
    for one in longer:  # on blocks that the second left in the cache
        assert_all_equal(run(engine, [one]), alone("4t4i_post", [one]))


@pytest.mark.parametrize("plan_ahead", [False, True])
def test_a_step_that_could_not_start_ends_no_request_that_waits(
    checkpoint_for: CheckpointFor, alone: Alone, plan_ahead: bool
) -> None:
    """Nothing is planned on top of a step that is known to have failed."""
    asks = [ask((BOS, *range(30 + i, 41 + i)), max_tokens=6) for i in range(2)]
    engine = make_engine(checkpoint_for("4t4i_post"), plan_ahead=plan_ahead, max_num_step_tokens=8)
    fail_step(engine, 1, late=False)
    assert assert_survivors(run(engine, asks), alone("4t4i_post", asks)) == 1


def test_an_aborted_request_of_a_failed_step_leaves_nothing_to_find(
    checkpoint_for: CheckpointFor, alone: Alone
) -> None:
    """It is aborted while its step is in flight, and then the step fails."""
    engine = make_engine(checkpoint_for("4t4i_post"), plan_ahead=True)
    mate, one = ask((BOS, 30), max_tokens=9), ask(LONG, max_tokens=5)

    def abort(step: int) -> None:
        if step == 2:
            assert engine.abort("r1")

    mend = fail_step(engine, 3, late=True)  # the first that r1 is in
    ((failed,), (aborted,)) = run(engine, [mate, one], per_step=1, between=abort)
    assert failed.finish_reason is FinishReason.ERROR
    assert aborted.token_ids == []
    mend()
    assert_all_equal(run(engine, [one]), alone("4t4i_post", [one]))
