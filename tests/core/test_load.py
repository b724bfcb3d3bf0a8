"""Which tokens a step computes, told by their ids."""

from __future__ import annotations

from momaserve.core.load import LoadMeter, StepLoad, visible_pairs
from momaserve.core.step import StepDraft
from momaserve.modality import Modality
from tests.core.factory import (
    BEGIN_IMAGE,
    IMAGE_IDS,
    make_forecast,
    make_request,
    make_scheduler,
    make_sequence,
    run_step,
)
from tests.core.slow_model import BEGIN, CODES, END

METER = LoadMeter(IMAGE_IDS, BEGIN_IMAGE)


def test_the_marks_are_those_of_the_slow_model() -> None:
    assert BEGIN == BEGIN_IMAGE
    assert all(code in IMAGE_IDS for code in CODES)


def test_the_last_token_tells_the_phase() -> None:
    for last, phase in (
        (5, Modality.TEXT),
        (BEGIN, Modality.IMAGE),
        (CODES[0], Modality.IMAGE),
        (END, Modality.TEXT),
    ):
        assert METER.phase(make_sequence([7, last])) is phase


def test_a_model_without_pictures_has_one_phase() -> None:
    meter = LoadMeter(range(0), None)
    sequence = make_sequence([7, CODES[0]])
    assert meter.phase(sequence) is Modality.TEXT
    assert meter.count_images(sequence, 0, 2) == 0


def test_tokens_of_a_prompt_by_modality() -> None:
    sequence = make_sequence([7, BEGIN, *CODES, *CODES, END, 8])
    assert METER.count_images(sequence, 0, 8) == 4
    assert METER.count_images(sequence, 3, 3) == 3
    assert METER.count_images(sequence, 6, 2) == 0


def test_a_token_that_is_being_sampled_is_of_the_phase() -> None:
    assert METER.count_images(make_sequence([7, BEGIN]), 2, 1) == 1
    assert METER.count_images(make_sequence([7, 8]), 2, 1) == 0


def test_pairs_of_a_chunk() -> None:
    assert visible_pairs(0, 4) == 1 + 2 + 3 + 4
    assert visible_pairs(10, 2) == 11 + 12


def test_the_load_of_a_step() -> None:
    scheduler = make_scheduler(forecast=make_forecast(fixed_s=1.0))
    scheduler.add_all(
        [
            make_request("a", 5),
            make_request("b", [7, 8, BEGIN], num_companions=1, in_picture=True),
            make_request("c", 3, prompt_logprobs=0),
        ]
    )
    plan = scheduler.schedule()
    assert plan.load == StepLoad(
        text_tokens=5 + 3 + 2 + 3,
        kv_tokens=5 + 3 + 2 + 3,
        visible_pairs=15 + 6 + 3 + 6,
        sampled_rows=1 + 2 + 1 + 3,
        code_rows=2,
    )
    assert plan.predicted_s == make_forecast(fixed_s=1.0).cost_model.predict(plan.load)
    scheduler.update(plan, {"a": [7], "b": [CODES[0]], "c": [7]}, ())
    scheduler.requests["b"].companions[0].token_ids.append(CODES[0])
    plan = run_step(scheduler)
    assert plan.load is not None
    assert (plan.load.text_tokens, plan.load.image_tokens) == (2, 2)
    assert plan.load.kv_tokens == 6 + 4 + 3 + 4


def test_without_a_forecast_nothing_is_predicted() -> None:
    scheduler = make_scheduler()
    scheduler.add_all([make_request("a", 5)])
    plan = scheduler.schedule()
    assert plan.load is None
    assert plan.predicted_s is None
    assert StepDraft(4, 4).measured_by(METER) == StepLoad()
