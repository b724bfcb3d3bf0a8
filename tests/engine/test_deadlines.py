"""Requests that run out of time, and requests that come before others."""

from __future__ import annotations

from typing import Any

import pytest

from momaserve.config import RoutingPolicy
from momaserve.engine import Engine
from momaserve.outputs import FinishReason, TokenOutput
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import (
    WORDS,
    Recorder,
    Ticks,
    answer,
    make_engine,
    reason_of,
    run_until_idle,
    submit,
    tokens_of,
)
from tests.engine.work import GREEDY, cache_of

TIMEOUT, LENGTH, ABORT = FinishReason.TIMEOUT, FinishReason.LENGTH, FinishReason.ABORT
TALKS: dict[str, Any] = {"text": GREEDY, "image": GREEDY, "ignore_eos": True}


class Still(Ticks):
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Still:
    return Still()


def timed(
    checkpoint_for: CheckpointFor, clock: Still, **options: Any
) -> tuple[Engine, Recorder, list[int]]:
    """An engine, its listener, and the answer of a request of ten tokens without a deadline."""
    engine = make_engine(checkpoint_for("4t4i_post"), clock=clock, **options)
    wanted = answer(engine, max_tokens=10, **TALKS)
    engine.listener = recorder = Recorder()
    return engine, recorder, wanted


# --- deadlines -----------------------------------------------------------------------------


@pytest.mark.parametrize("plan_ahead", [False, True])
def test_a_running_request_ends_at_its_deadline(
    checkpoint_for: CheckpointFor, clock: Still, plan_ahead: bool
) -> None:
    engine, recorder, wanted = timed(checkpoint_for, clock, plan_ahead=plan_ahead)
    submit(engine, "late", max_tokens=10, timeout_s=5.0, **TALKS)
    submit(engine, "other", max_tokens=10, **TALKS)
    outputs: list[TokenOutput] = []
    for _ in range(3):
        outputs += engine.step()
    clock.now = 4.999
    outputs += engine.step()
    assert len(tokens_of(outputs, "late")) == 4
    clock.now = 5.0
    ended = engine.step()
    assert [o.finish_reason for o in ended if o.request_id == "late"] == [TIMEOUT]
    engine.scheduler.check()
    assert "late" not in engine.scheduler.requests
    outputs += ended + run_until_idle(engine)
    assert tokens_of(outputs, "late") == wanted[:4]
    assert tokens_of(outputs, "other") == wanted
    assert (reason_of(outputs, "late"), reason_of(outputs, "other")) == (TIMEOUT, LENGTH)
    assert [(s.finish_reason, s.e2e_s) for s in recorder.finished][0] == (TIMEOUT, 5.0)
    assert recorder.finished[0].num_generated_tokens == 4


def test_a_waiting_request_ends_at_its_deadline(
    checkpoint_for: CheckpointFor, clock: Still
) -> None:
    engine, recorder, wanted = timed(checkpoint_for, clock, max_num_requests=1)
    submit(engine, "running", max_tokens=10, **TALKS)
    submit(engine, "late", max_tokens=10, timeout_s=2.0, **TALKS)
    submit(engine, "patient", max_tokens=10, timeout_s=1e4, **TALKS)
    outputs = engine.step()
    clock.now = 3.0
    ended = engine.step()
    assert [(o.request_id, o.finish_reason) for o in ended] == [
        ("late", TIMEOUT),
        ("running", None),
    ]
    assert engine.scheduler.num_waiting == 1
    outputs += ended + run_until_idle(engine)
    assert tokens_of(outputs, "late") == []
    assert tokens_of(outputs, "running") == tokens_of(outputs, "patient") == wanted
    assert recorder.finished[0].queue_s == 3.0


def test_nothing_but_deadlines_is_left_to_do(checkpoint_for: CheckpointFor, clock: Still) -> None:
    engine, _, _ = timed(checkpoint_for, clock)
    submit(engine, "r", max_tokens=10, timeout_s=1.0, n=3, **TALKS)
    clock.now = 1.0
    outputs = engine.step()
    assert [(o.request_id, o.finish_reason) for o in outputs] == [
        ("r-0", TIMEOUT),
        ("r-1", TIMEOUT),
        ("r-2", TIMEOUT),
    ]
    assert not engine.has_work
    assert engine.step() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3},
        {"mode": "image", "guidance_scale": 2.0},
        {"mode": "image", "guidance_scale": 2.0, "n": 2},
        {"prompt_routing": RoutingPolicy.EXPERT_CHOICE},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("num_steps", range(3))
def test_blocks_of_a_late_request_are_free_at_once(
    checkpoint_for: CheckpointFor, clock: Still, num_steps: int, fields: dict[str, Any]
) -> None:
    engine, _, wanted = timed(checkpoint_for, clock, max_num_step_tokens=8)
    submit(engine, "other", max_tokens=10, **TALKS)
    outputs = engine.step()
    used = engine.scheduler.kv_cache.usage
    submit(engine, "late", max_tokens=10, timeout_s=1.0, cache_salt="x", **TALKS, **fields)
    for _ in range(num_steps):
        outputs += engine.step()
    assert engine.scheduler.kv_cache.usage > used or num_steps == 0
    clock.now = 2.0
    outputs += engine.step()
    engine.scheduler.check()
    assert engine.scheduler.num_running == 1
    assert not engine.scheduler.num_waiting
    outputs += run_until_idle(engine)
    assert tokens_of(outputs, "other") == wanted


def test_who_ended_before_its_deadline_does_not_end_again(
    checkpoint_for: CheckpointFor, clock: Still
) -> None:
    """Nor does a new request of the same name."""
    engine, recorder, wanted = timed(checkpoint_for, clock)
    for _ in range(100):
        submit(engine, "r", max_tokens=1, timeout_s=5.0, **TALKS)
        run_until_idle(engine)
    submit(engine, "r", max_tokens=10, timeout_s=50.0, **TALKS)
    submit(engine, "gone", max_tokens=10, timeout_s=5.0, **TALKS)
    engine.abort("gone")
    outputs = engine.step()
    clock.now = 20.0
    outputs += run_until_idle(engine)
    assert tokens_of(outputs, "r") == wanted
    assert reason_of(outputs, "r") is LENGTH
    reasons = [s.finish_reason for s in recorder.finished]
    assert reasons == [LENGTH] * 100 + [ABORT, LENGTH]


def test_the_clock_runs_from_the_arrival(checkpoint_for: CheckpointFor) -> None:
    """With the clock of the other tests, which ticks whenever it is read."""
    engine = make_engine(checkpoint_for("4t4i_post"))
    submit(engine, "r", max_tokens=50, timeout_s=10.0, **TALKS)
    outputs = run_until_idle(engine)
    assert reason_of(outputs, "r") is TIMEOUT
    assert 1 <= len(tokens_of(outputs, "r")) <= 5


@pytest.mark.parametrize("reason", [TIMEOUT, FinishReason.ERROR])
def test_the_last_output_says_what_was_cached_however_it_ends(
    checkpoint_for: CheckpointFor, clock: Still, reason: FinishReason
) -> None:
    """`num_cached_tokens` is the same on all outputs of a request."""
    engine, _, _ = timed(checkpoint_for, clock)
    submit(engine, "r", max_tokens=10, timeout_s=1.0, **TALKS)
    outputs = engine.step()
    assert [output.num_cached_tokens for output in outputs] == [4]
    if reason is TIMEOUT:
        clock.now = 2.0
    else:
        broken: Any = lambda *_, **__: 1 // 0  # noqa: E731
        engine._runner.execute = broken  # type: ignore[method-assign]
    (last,) = engine.step()
    assert last.finish_reason is reason
    assert last.num_cached_tokens == 4


# --- priorities ----------------------------------------------------------------------------


def starts(engine: Engine) -> list[str]:
    """Requests in the order of their first outputs, until all are done."""
    return list(dict.fromkeys(output.request_id for output in run_until_idle(engine)))


def test_smaller_priorities_start_first_then_who_came_first(
    checkpoint_for: CheckpointFor,
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_requests=1)
    for name, priority in (("a", 3), ("b", 1), ("c", 2), ("d", 1), ("e", -5), ("f", 3), ("g", 0)):
        submit(engine, name, max_tokens=3, priority=priority, **TALKS)
    assert starts(engine) == ["e", "g", "b", "d", "c", "a", "f"]


def test_who_runs_is_not_displaced_for_a_slot(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_requests=1)
    submit(engine, "a", max_tokens=5, priority=1, **TALKS)
    submit(engine, "b", max_tokens=2, priority=1, **TALKS)
    outputs = engine.step()
    submit(engine, "c", max_tokens=2, priority=-1, **TALKS)
    outputs += run_until_idle(engine)
    assert list(dict.fromkeys(o.request_id for o in outputs)) == ["a", "c", "b"]
    assert len(tokens_of(outputs, "a")) == 5


def test_samples_of_one_prompt_keep_their_place(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_requests=1)
    submit(engine, "a", max_tokens=2, n=2, **TALKS)
    submit(engine, "b", max_tokens=2, priority=1, n=2, **TALKS)
    submit(engine, "c", max_tokens=2, **TALKS)
    assert starts(engine) == ["a-0", "a-1", "c", "b-0", "b-1"]


def test_smaller_priorities_are_preempted_later(checkpoint_for: CheckpointFor) -> None:
    checkpoint = checkpoint_for("4t4i_post")
    engine = make_engine(checkpoint, **cache_of(checkpoint, 9))
    fields: dict[str, Any] = {"max_tokens": 14, **TALKS}
    wanted = answer(engine, WORDS, **fields)
    engine.listener = recorder = Recorder()
    for name, priority in (("low", 5), ("high", 0), ("mid", 1)):
        submit(engine, name, WORDS, priority=priority, cache_salt=name, **fields)
    preempted: dict[str, int] = {}
    outputs: list[TokenOutput] = []
    while engine.has_work:
        requests = list(engine.scheduler.requests.values())
        outputs += engine.step()
        preempted |= {r.request_id: r.num_preemptions for r in requests}
    assert preempted["high"] == 0
    assert preempted["low"] + preempted["mid"] > 0
    assert sum(step.num_preemptions for step in recorder.steps) == sum(preempted.values())
    assert [o.request_id for o in outputs if o.finish_reason] == ["high", "mid", "low"]
    assert all(tokens_of(outputs, name) == wanted for name in preempted)
