"""Router-aware scheduling in the engine: predictions, what is told of them, and equal answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from momaserve.config import SchedulerConfig, Scheduling
from momaserve.core.cost_model import MachineRates
from momaserve.core.plan import StepPlan
from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve.llm import engine_config
from momaserve.loading import load_model_parts
from momaserve.models.presets import preset_config
from momaserve.sampling import OutputMode
from momaserve.step_timer import StepTimer, make_forecast
from tests.core.factory import make_forecast as make_core_forecast
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import Recorder, Ticks, make_engine, run_until_idle, submit, tokens_of

RATES = MachineRates(bytes_per_s=1e9, flops_per_s=1e10, fixed_s=0.5)


def listened(checkpoint_for: CheckpointFor, **options: Any) -> tuple[Engine, Recorder]:
    config = engine_config({"dtype": "float32", "block_size": 4, **options})
    parts = load_model_parts(checkpoint_for("4t4i_post"), config)
    engine = Engine(parts, config, clock=Ticks(), rates=RATES)
    engine.listener = recorder = Recorder()
    return engine, recorder


def submit_both_kinds(engine: Engine, count: int) -> None:
    for number in range(count):
        submit(engine, f"w{number}", seed=number, max_tokens=5, ignore_eos=True)
        submit(engine, f"p{number}", seed=number, mode=OutputMode.IMAGE)


def test_steps_are_predicted_and_the_model_learns(checkpoint_for: CheckpointFor) -> None:
    """Each step takes a second of this clock, and half of one was expected."""
    engine, recorder = listened(checkpoint_for)
    submit(engine, "r", max_tokens=12, ignore_eos=True)
    run_until_idle(engine)
    predicted = [step.predicted_s for step in recorder.steps]
    assert len(predicted) == 12
    assert predicted[0] == pytest.approx(0.5, abs=0.01)
    assert predicted[-1] == pytest.approx(1.0, abs=0.02)
    assert engine.step_timer.median_error is not None
    assert engine.step_timer.median_error < 0.1


def test_first_come_first_served_predicts_nothing(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for, scheduling="fcfs")
    submit(engine, "r", max_tokens=3, ignore_eos=True)
    run_until_idle(engine)
    assert [step.predicted_s for step in recorder.steps] == [None] * 3
    assert engine.step_timer.median_error is None


def test_the_same_requests_give_the_same_predictions(checkpoint_for: CheckpointFor) -> None:
    found = []
    for _ in range(2):
        engine, recorder = listened(checkpoint_for, max_num_requests=2)
        submit_both_kinds(engine, 6)
        run_until_idle(engine)
        found.append([(step.predicted_s, step.num_tokens) for step in recorder.steps])
    assert found[0] == found[1]


@pytest.mark.parametrize("plan_ahead", [False, True])
def test_answers_do_not_depend_on_who_starts_first(
    checkpoint_for: CheckpointFor, plan_ahead: bool
) -> None:
    answers, orders = [], []
    for scheduling in Scheduling:
        engine, _ = listened(
            checkpoint_for, scheduling=scheduling, max_num_requests=2, plan_ahead=plan_ahead
        )
        submit_both_kinds(engine, 6)
        outputs = run_until_idle(engine)
        names = sorted({output.request_id for output in outputs})
        answers.append({name: tokens_of(outputs, name) for name in names})
        orders.append([o.request_id for o in outputs if o.finish_reason is not None])
    assert answers[0] == answers[1]
    assert orders[0] != orders[1]  # so that there is something to be equal


def test_a_step_time_target_cuts_prompts(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for, step_time_target_ms=0.001)
    prompt = list(range(22, 34))
    submit(engine, "r", prompt, max_tokens=1, ignore_eos=True)
    run_until_idle(engine)
    assert [step.num_tokens for step in recorder.steps] == [4, 5, 3]


# --- step timer -------------------------------------------------------------------------------


def test_steps_that_overlap_are_timed_from_the_end_of_the_one_before() -> None:
    timer = StepTimer(None)
    assert timer.settle(StepPlan(), 1.0, 3.0) == 2.0
    assert timer.settle(StepPlan(), 2.0, 4.5) == 1.5
    assert timer.settle(StepPlan(), 6.0, 7.0) == 1.0


def test_a_step_that_was_not_predicted_teaches_nothing() -> None:
    forecast = make_core_forecast()
    StepTimer(forecast).settle(StepPlan(), 0.0, 9.0)
    assert forecast.cost_model.median_error is None


def test_rates_are_measured_where_none_are_given() -> None:
    config, cpu = preset_config("moma-90m-4t4i"), torch.device("cpu")
    forecast = make_forecast(SchedulerConfig(), config, torch.float32, cpu, None)
    assert forecast is not None
    assert forecast.cost_model.rates.fixed_s > 0
    given = make_forecast(SchedulerConfig(), config, torch.float32, cpu, RATES)
    assert given is not None
    assert given.cost_model.rates == RATES
    fcfs = SchedulerConfig(scheduling=Scheduling.FCFS)
    assert make_forecast(fcfs, config, torch.float32, cpu, RATES) is None


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheduling": "lifo"}, r"scheduling must be one of .*router-aware.*fcfs.*, got 'lifo'"),
        ({"max_num_passes": -1}, "max_num_passes must be at least 0, got -1"),
        ({"step_time_target_ms": 0.0}, "step_time_target_ms must be a positive number"),
        ({"step_time_target_ms": float("nan")}, "step_time_target_ms must be a positive number"),
        ({"step_time_target_ms": float("inf")}, "step_time_target_ms must be a positive number"),
        (
            {"scheduling": "fcfs", "max_num_passes": 3},
            "max_num_passes 3 needs scheduling router-aware, got fcfs",
        ),
        (
            {"scheduling": "fcfs", "step_time_target_ms": 5.0},
            r"step_time_target_ms 5.0 needs scheduling router-aware, got fcfs",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**fields)


def test_passes_allowed_follow_the_slots() -> None:
    assert SchedulerConfig(max_num_requests=8).num_passes_allowed == 32
    assert SchedulerConfig(max_num_requests=8, max_num_passes=0).num_passes_allowed == 0


def test_a_plain_string_is_taken_for_its_policy() -> None:
    assert SchedulerConfig(scheduling="fcfs").scheduling is Scheduling.FCFS  # type: ignore[arg-type]


def test_make_engine_measures(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    assert engine.step_timer.forecast is not None
    assert engine.step_timer.forecast.cost_model.rates.bytes_per_s > 0
