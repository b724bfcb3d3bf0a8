"""Made-up requests in front of the first real ones: what they run, and that they leave nothing."""

from __future__ import annotations

from typing import Any

import pytest

from momaserve.engine import Engine
from momaserve.errors import WarmUpError
from momaserve.warm_up import warm_up
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import NUM_CODES, Recorder, answer, make_engine, run_until_idle, submit

KINDS = ["4t4i_post", "moe_8x_pre", "depth_4t4i_pre", "dense_post"]


def listened(engine: Engine) -> Recorder:
    recorder = Recorder()
    engine.listener = recorder
    return recorder


@pytest.mark.parametrize("case", KINDS)
def test_nothing_of_it_is_left(checkpoint_for: CheckpointFor, case: str) -> None:
    fresh = make_engine(checkpoint_for(case), scheduling="router-aware")
    wanted = answer(fresh, max_tokens=6, ignore_eos=True)
    engine = make_engine(checkpoint_for(case), scheduling="router-aware")
    recorder = listened(engine)
    assert warm_up(engine).batch_sizes == (1, 8)
    assert not engine.has_work and engine.scheduler.kv_cache.usage == 0
    assert not recorder.steps and not recorder.finished
    assert engine.step_timer.median_error is None and engine.step_timer.forecast is not None
    assert answer(engine, max_tokens=6, ignore_eos=True) == wanted
    assert recorder.steps[0].prefix_cache_hits == 0
    assert engine.listener is recorder and len(recorder.finished) == 1


def test_words_and_pictures_decode_beside_each_other(
    checkpoint_for: CheckpointFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    steps: list[tuple[int, int]] = []
    schedule = engine.scheduler.schedule

    def watched(*args: Any) -> Any:
        plan = schedule(*args)
        rows = [planned.num_new_tokens for planned in plan.sequences]
        steps.append((len(rows), max(rows, default=0)))
        return plan

    monkeypatch.setattr(engine.scheduler, "schedule", watched)
    warm_up(engine)
    assert (1, 1) in steps and (8, 1) in steps
    assert max(longest for _, longest in steps) > 8  # and prompts


def test_all_sizes_that_a_gpu_captures(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_requests=20)
    engine.backend_name = "triton"
    assert warm_up(engine).batch_sizes == (1, 2, 4, 8, 12, 16, 20)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"max_num_requests": 1}, (1,)),
        ({"max_num_requests": 3, "max_queued_requests": 2}, (1, 2)),
        ({"max_queued_tokens": 1}, (1,)),
        ({"max_model_len": NUM_CODES + 2}, (1, 8)),
        ({"max_model_len": 1, "kv_cache_bytes": 1 << 16}, (1, 8)),
        ({"max_num_step_tokens": 8}, (1, 8)),
        ({"prompt_routing": "expert_choice"}, (1, 8)),
        ({"plan_ahead": True}, (1, 8)),
    ],
)
def test_whatever_the_limits_are(
    checkpoint_for: CheckpointFor, options: dict[str, Any], sizes: tuple[int, ...]
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), **options)
    assert warm_up(engine).batch_sizes == sizes
    assert not engine.has_work and engine.scheduler.kv_cache.usage == 0
    engine.scheduler.check()


def test_an_engine_that_fails_says_so(
    checkpoint_for: CheckpointFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    recorder = listened(engine)

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "execute", broken)
        with pytest.raises(WarmUpError, match=r"a first step of 1 requests failed: .*RuntimeError"):
            warm_up(engine)
    assert not engine.has_work and engine.scheduler.kv_cache.usage == 0
    assert engine.listener is recorder
    submit(engine, "r", max_tokens=2)
    assert run_until_idle(engine)[-1].finish_reason is not None


def test_a_device_beyond_use_says_so(
    checkpoint_for: CheckpointFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(engine._runner, "execute", broken)
    monkeypatch.setattr(engine._runner, "check_device", broken)
    with pytest.raises(WarmUpError, match=r"1 requests failed: RuntimeError: an illegal memory"):
        warm_up(engine)


def test_an_engine_at_work_is_left_alone(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    submit(engine, "r", max_tokens=2)
    with pytest.raises(ValueError, match="requests of its own"):
        warm_up(engine)
    run_until_idle(engine)
