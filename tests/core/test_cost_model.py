"""Predicted times against sums done by hand, and what becomes of measured ones."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from momaserve.core.cost_model import CostModel, MachineRates
from momaserve.core.load import StepLoad
from momaserve.core.model_costs import LayerCosts, ModelCosts, model_costs
from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.presets import preset_config
from tests.core.factory import FOUR_AND_FOUR, ONE_GROUP, make_costs

RATES = MachineRates(bytes_per_s=1.0, flops_per_s=1000.0, fixed_s=7.0)
"""Reading is what takes time, unless a part has a thousand operations for each byte."""


def predict(load: StepLoad, costs: ModelCosts | None = None, rates: MachineRates = RATES) -> float:
    return CostModel(costs or make_costs(), rates).predict(load)


def test_a_step_of_nothing_takes_the_fixed_time() -> None:
    assert predict(StepLoad()) == 7.0


def test_one_token_of_text() -> None:
    """Two layers: 40 bytes each for attention, one expert of four in each, 2 per K/V read."""
    load = StepLoad(text_tokens=1, kv_tokens=5, visible_pairs=5, sampled_rows=1)
    assert predict(load) == pytest.approx(7 + 2 * 40 + 2 * 100 + 2 * 5 * 2 + 60)


def test_nothing_sampled_reads_no_head() -> None:
    with_head = predict(StepLoad(text_tokens=1, sampled_rows=1))
    assert with_head - predict(StepLoad(text_tokens=1)) == pytest.approx(60)


def test_where_all_rows_choose_codes_the_head_of_words_is_not_read() -> None:
    costs = replace(make_costs(), code_share=0.25)
    rows = StepLoad(image_tokens=2, sampled_rows=2)
    whole = predict(rows, costs)
    assert whole - predict(replace(rows, code_rows=2), costs) == pytest.approx(0.75 * 60)
    assert predict(replace(rows, code_rows=1), costs) == pytest.approx(whole)
    assert predict(StepLoad(image_tokens=2), costs) == pytest.approx(whole - 60)


def test_a_row_of_codes_computes_its_share_of_the_head() -> None:
    costs = replace(make_costs(), code_share=0.25, head_flops=2e6)  # 2000 s for each row of words
    parts = [
        predict(StepLoad(image_tokens=4, sampled_rows=4, code_rows=codes), costs)
        for codes in (0, 1, 4)
    ]
    assert parts[0] - parts[1] == pytest.approx(0.75 * 2000)
    assert parts[0] - parts[2] == pytest.approx(4 * 0.75 * 2000)


@pytest.mark.parametrize(
    ("text", "image", "distinct"),
    [
        (4, 4, 8 * (1 - 0.75**4)),  # 5.5 of 8
        (8, 0, 4 * (1 - 0.75**8)),  # 3.6
        (0, 8, 4 * (1 - 0.75**8)),
        (1, 0, 1.0),
    ],
)
def test_expected_distinct_experts(text: int, image: int, distinct: float) -> None:
    costs = make_costs()
    load = StepLoad(text_tokens=text, image_tokens=image)
    counted = sum(costs.distinct_experts(group, load) for group in costs.groups)
    assert counted == pytest.approx(2 * distinct)  # two layers
    pairs = sum(costs.routed_pairs(group, load) for group in costs.groups)
    assert pairs == pytest.approx(2 * (text + image))


def test_experts_that_are_used_unequally() -> None:
    costs = make_costs()
    skewed = replace(costs.groups[0], rates=(0.7, 0.2, 0.1, 0.0))
    load = StepLoad(text_tokens=2)
    expected = 2 * ((1 - 0.3**2) + (1 - 0.8**2) + (1 - 0.9**2))
    assert costs.distinct_experts(skewed, load) == pytest.approx(expected)
    assert costs.routed_pairs(skewed, load) == pytest.approx(2 * 2 * 1.0)


def test_a_group_of_all_modalities_counts_them_together() -> None:
    costs = make_costs(ONE_GROUP)
    (group,) = costs.groups
    mixed = costs.distinct_experts(group, StepLoad(text_tokens=3, image_tokens=5))
    alone = costs.distinct_experts(group, StepLoad(text_tokens=8))
    assert mixed == pytest.approx(alone)


def test_one_expert_is_read_whole_or_not_at_all() -> None:
    costs = make_costs(num_experts=1)
    text, image = costs.groups
    for count in (1, 2, 50):
        load = StepLoad(text_tokens=count)
        assert costs.distinct_experts(text, load) == 2
        assert costs.distinct_experts(image, load) == 0


def test_many_tokens_are_bound_by_arithmetic() -> None:
    """The head of 1e6 rows computes 3e7 operations and reads 60 bytes."""
    load = StepLoad(text_tokens=1, sampled_rows=1e6)
    assert predict(load) - predict(StepLoad(text_tokens=1)) == pytest.approx(1e6 * 30 / 1000)


def test_layers_that_take_a_part_of_the_tokens() -> None:
    """A depth-routed layer with capacity 1/4, for text alone."""
    costs = replace(make_costs(), layers=(LayerCosts(num_layers=1, shares=(0.25, 1.0)),))
    text, image = costs.groups
    load = StepLoad(text_tokens=4, image_tokens=2, kv_tokens=6, visible_pairs=6)
    assert costs.routed_pairs(text, load) == pytest.approx(1)
    assert costs.routed_pairs(image, load) == pytest.approx(2)
    assert costs.distinct_experts(text, load) == pytest.approx(4 * (1 - (1 - 1 / 16) ** 4))
    share = (0.25 * 4 + 2) / 6
    assert costs.parts(load)[1].num_bytes == pytest.approx(share * 6 * 2)
    assert costs.parts(load)[1].flops == pytest.approx(share**2 * 6)


def test_more_of_anything_never_takes_less() -> None:
    dice = random.Random(0)
    for _ in range(100):
        fields = {name: dice.randint(0, 30) for name in StepLoad.__slots__}
        more = fields | {(name := dice.choice(list(fields))): fields[name] + 1}
        assert predict(StepLoad(**more)) >= predict(StepLoad(**fields))


def test_bytes_that_one_more_token_adds() -> None:
    costs = make_costs()
    for rows in range(6):
        load = StepLoad(text_tokens=rows, image_tokens=2)
        before, after = (
            sum(part.num_bytes for part in costs.parts(step)[3:])
            for step in (load, replace(load, text_tokens=rows + 1))
        )
        added = costs.added_expert_bytes(load, Modality.TEXT)
        assert added == pytest.approx(after - before)


# --- of a model's configuration --------------------------------------------------------------


def test_a_preset_in_numbers() -> None:
    """The shape that the benchmark's goal speaks of: 24 layers, D 1024, F 2730."""
    config = preset_config("moma-435m-4t4i")
    costs = model_costs(config, weight_bytes=2)
    assert [group.modalities for group in costs.groups] == list(FOUR_AND_FOUR)
    assert [group.expert_bytes for group in costs.groups] == [2 * 3 * 1024 * 2730] * 2
    assert costs.head_bytes == 2 * 65536 * 1024
    assert costs.code_share == 8192 / 65536
    routers = 2 * (4 * 1024 + 512 * (1024 + 4))
    assert costs.dense_bytes == 2 * (4 * 1024 * 1024 + routers)
    assert costs.kv_bytes == 2 * 2 * 1024
    assert costs.layers == (LayerCosts(num_layers=24, shares=(1.0, 1.0)),)


def test_depth_routing_makes_two_kinds_of_layers() -> None:
    costs = model_costs(preset_config("moma-mod-110m-4t4i"), weight_bytes=2)
    assert sorted((layer.num_layers, layer.shares) for layer in costs.layers) == [
        (7, (0.25, 0.25)),
        (7, (1.0, 1.0)),
    ]


def test_an_architecture_without_routers_has_none_to_read() -> None:
    costs = model_costs(preset_config("moma-90m-dense"), weight_bytes=4)
    assert costs.dense_bytes == 4 * 4 * 512 * 512
    assert [group.rates for group in costs.groups] == [(1.0,)]


# --- measured steps ---------------------------------------------------------------------------


def random_load(dice: random.Random) -> StepLoad:
    rows = dice.randint(1, 16)
    prompt = dice.choice([0, 0, 0, dice.randint(16, 500)])
    images = dice.randint(0, rows)
    return StepLoad(
        text_tokens=rows - images + prompt,
        image_tokens=images,
        kv_tokens=rows * dice.randint(20, 400) + prompt,
        visible_pairs=rows * 100 + prompt**2 / 2,
        sampled_rows=rows,
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("bandwidth", "speed", "fixed"), [(0.5, 1, 1), (3, 0.3, 0.2), (1, 4, 10)])
def test_a_wrong_start_is_corrected(
    seed: int, bandwidth: float, speed: float, fixed: float
) -> None:
    costs = model_costs(preset_config("moma-90m-4t4i"), weight_bytes=4)
    truth = MachineRates(bytes_per_s=20e9, flops_per_s=100e9, fixed_s=2e-3)
    believed = MachineRates(
        bytes_per_s=20e9 * bandwidth, flops_per_s=100e9 * speed, fixed_s=2e-3 * fixed
    )
    real, model = CostModel(costs, truth), CostModel(costs, believed)
    dice = random.Random(seed)
    for _ in range(300):
        load = random_load(dice)
        seconds = real.predict(load) * math.exp(dice.gauss(0, 0.05))
        model.observe(load, seconds, model.predict(load))
    assert model.median_error is not None
    assert model.median_error <= 0.15


def test_the_same_steps_give_the_same_predictions() -> None:
    def play() -> list[float]:
        model, dice = CostModel(make_costs(), RATES), random.Random(3)
        found = []
        for _ in range(50):
            load = random_load(dice)
            found.append(model.predict(load))
            model.observe(load, dice.uniform(100, 2000), found[-1])
        return [*found, *model.factors]

    assert play() == play()


def test_the_median_error_is_that_of_all_steps() -> None:
    model = CostModel(make_costs(), RATES)
    assert model.median_error is None
    for predicted in (100.0, 110.0, 150.0):
        model.observe(StepLoad(text_tokens=1), 100.0, predicted)
    assert model.median_error == pytest.approx(0.105)
    for _ in range(4):
        model.observe(StepLoad(text_tokens=1), 1.0, 1e9)
    assert model.median_error == pytest.approx(3.995)  # and all above


def test_a_step_without_time_is_no_error() -> None:
    model = CostModel(make_costs(), RATES)
    model.observe(StepLoad(text_tokens=1), 0.0, 5.0)
    assert model.median_error is None
    assert tuple(model.factors) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("bytes_per_s", 0.0), ("flops_per_s", -1.0), ("fixed_s", -0.1), ("bytes_per_s", math.nan)],
)
def test_rates_must_be_positive(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be"):
        replace(RATES, **{field: value})
