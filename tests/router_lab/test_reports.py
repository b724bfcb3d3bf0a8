"""Paired tests of tasks, sentences, and conditions under shift, on cases made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from momaserve.router_lab.comparison import served_difference
from momaserve.router_lab.documents import has_picture, num_tokens
from momaserve.router_lab.findings import comparisons, findings, signed, tally
from momaserve.router_lab.shifted import CLEAN, Conditions
from momaserve.router_lab.source import LabData
from momaserve.router_lab.statistics import Bootstrap
from momaserve.router_lab.studies.generation import TASKS, compare
from tests.router_lab.factory import NumberWords
from tests.router_lab.test_fitting import CONFIG, rows

Bools = list[bool]


def outcomes(right: Bools) -> dict[str, Bools]:
    return dict.fromkeys(TASKS, right)


def test_tasks_are_compared_item_by_item() -> None:
    best = [True] * 9 + [False]
    worse = [False] * 7 + [True] * 3  # loses seven, gains one
    found = compare({"causal": outcomes(worse), "calibrated": outcomes(best)})[TASKS[0]]
    assert found["best"] == "calibrated"
    assert found["policies"]["calibrated"]["score"] == 0.9
    row = found["policies"]["causal"]
    assert (row["score"], row["only_this"], row["only_best"]) == (0.3, 1, 7)
    assert row["p"] == pytest.approx(2 * (1 + 8) / 2**8)
    assert not row["is_worse"]  # p is 0.07
    worse[9] = False
    row = compare({"a": outcomes(worse), "b": outcomes(best)})[TASKS[0]]["policies"]["a"]
    assert row["p"] == pytest.approx(2 / 2**7)
    assert row["is_worse"]


def estimate(value: float, half: float = 0.001) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def difference(value: float) -> dict[str, Any]:
    return {"loss": {name: estimate(value) for name in ("text", "image", "all")}, "f1": {}}


def policies(train: float, held_out: float) -> dict[str, Any]:
    def split(value: float) -> dict[str, Any]:
        agreement = {"accuracy": estimate(0.954), "f1": estimate(0.91)}
        nll = {"nll": estimate(1.0), "delta": estimate(0.0), "kept": "yes"}
        causal = {"nll": estimate(1.02), "delta": estimate(0.02), "kept": "no"}
        return {
            "loss": {
                "expert_choice": {"text": nll, "image": nll},
                "causal": {"text": nll, "image": causal},
            },
            "agreement": {"at_expert_choice": {"causal": {"text": agreement}}},
            "served_difference": difference(value),
        }

    return {"splits": {"train": split(train), "held_out": split(held_out)}}


@pytest.mark.parametrize(
    ("train", "held_out", "shifted", "answer"),
    [
        (0.01, 0.0, [0.0] * 9, "Causal:"),
        (-0.01, 0.0, [0.01] * 9, "Calibrated thresholds:"),
        (0.01, -0.01, [0.0] * 9, "It depends"),
        (0.0, 0.0, [0.0] * 9, "Either:"),
        (0.0, 0.0, [0.01] * 9, "Causal:"),
        (0.0, 0.0, [0.01] + [0.0] * 18, "Either:"),  # one in twenty is chance
        (0.0, 0.0, [0.01, -0.01] * 5, "Either:"),
    ],
)
def test_which_to_serve(train: float, held_out: float, shifted: list[float], answer: str) -> None:
    points = [{"severity": 1, "served_difference": difference(value)} for value in shifted]
    shift = {"shifts": {"typos": {"unit": "letters, %", "points": points}}}
    parts = {"policies": policies(train, held_out), "shift": shift}
    (found,) = [f for f in findings(parts) if f["question"].startswith("Which should")]
    assert found["answer"].startswith(answer)
    assert len(comparisons(parts)) == 2 + len(shifted)


def test_sentences_say_what_the_numbers_say() -> None:
    found = findings({"policies": policies(0.0, 0.0)})
    assert found[0]["answer"] == "text 95.40 % (F1 0.9100)."
    assert found[2]["answer"] == "No: image tokens lose more than that."
    assert "image +0.0200 nat (+0.0190 to +0.0210) on 1.0000" in found[2]["detail"]
    assert findings({}) == []


def test_the_sensitivity_to_noise_is_said_with_the_floor() -> None:
    point = {"sigma": 0.005, "loss": {"all": {"delta": estimate(0.004)}}}
    curve: dict[str, Any] = {
        "base": "expert_choice",
        "part": "depth",
        "kind": "uniform",
        "points": [point],
    }
    curve |= {"one_percent": {"all": {"value": 0.012, "low": 0.008, "high": None}}}
    curve |= {"loses_to_baseline": {"all": {"value": None, "low": None, "high": None}}}
    noise = {"curves": [curve], "floor": {"expert_choice": {"depth": 0.0031}}}
    first, second = findings({"noise": noise})
    assert first["answer"] == "Of 1.20 % (0.80 to more than was tried)."
    assert "At 0.5 % the loss moves by +0.0040 nat" in first["detail"]
    assert "bf16 rounding alone turns 0.31 %" in first["detail"]
    assert second["answer"] == "At none that was tried."


@pytest.mark.parametrize(
    ("cost", "answer"), [(0.010, "No, less"), (0.0145, "That cannot be told apart.")]
)
def test_own_mistakes_are_held_against_random_ones(cost: float, answer: str) -> None:
    """2.5 % of expert decisions are wrong: half-way between 2 % and 3 % of noise."""
    found = policies(0.0, 0.0)
    train = found["splits"]["train"]
    train["error_rate"] = {"causal": {"experts": 0.025}}
    train["loss"]["causal"]["all"] = {"delta": estimate(cost)}
    points = [
        {"sigma": sigma, "loss": {"all": {"delta": estimate(delta)}}}
        for sigma, delta in ((0.0, 0.0), (0.02, 0.01), (0.03, 0.02))
    ]
    curve: dict[str, Any] = {"base": "expert_choice", "part": "experts", "kind": "uniform"}
    curve |= {"points": points, "one_percent": {"all": estimate(0.01)}}
    parts = {"policies": found, "noise": {"curves": [curve], "floor": {}}}
    (said,) = [f for f in findings(parts) if f["question"].startswith("Do the auxiliary")]
    assert said["answer"].startswith(answer)
    assert "as many turned at random cost +0.0150 nat" in said["detail"]


def test_clear_differences_are_counted() -> None:
    found = tally([difference(0.01), difference(-0.01), difference(0.0005), difference(0.02)])
    assert found == {name: [1, 2, 1] for name in ("text", "image", "all")}
    assert signed({"value": 0.1, "low": None, "high": None}) == "+0.1000"
    assert signed({"value": None, "low": None, "high": None}) == "unknown"


def test_only_what_was_measured_is_compared() -> None:
    sums = np.array([[2.0, 0.0, 2.0, 0.0], [3.0, 0.0, 2.0, 0.0]])
    bootstrap = Bootstrap(20, 0)
    assert served_difference({"causal": sums}, {}, bootstrap) == {}
    both = served_difference({"causal": sums, "calibrated": 2 * sums}, {}, bootstrap)
    assert both.keys() == {"loss"}
    assert both["loss"]["text"]["value"] == 0.0  # twice the loss of twice the tokens


# --- conditions ----------------------------------------------------------------------------


def lab_data() -> LabData:
    return LabData(
        config=CONFIG,
        splits={},
        fresh_rows=rows,
        short_rows=rows,
        row_length=40,
        num_rows=4,
        text=NumberWords.tokenizer(),
        pictures=None,
        find_pictures=lambda wanted: {},
        summary="",
    )


def made(points: Any = lambda values: values) -> tuple[Conditions, dict[tuple[str, float], Any]]:
    conditions = Conditions(lab_data(), 3, 0, points)
    return conditions, {(each.shift, each.severity): each for each in conditions}


def share_of_codes(batches: Any) -> float:
    real = sum(int((~b.is_padding).sum()) for b in batches)
    codes = sum(int(((b.token_ids >= 4) & (b.token_ids < 20)).sum()) for b in batches)
    return 100 * codes / real


def test_compositions_have_the_share_that_they_say() -> None:
    """Words alone are mixed with pictures: here a fifth to half of the tokens are codes."""
    conditions, found = made()
    shares = [severity for shift, severity in found if shift == "batch composition"]
    assert len(shares) >= 2
    for severity in shares:
        batches = found["batch composition", severity].batches
        assert share_of_codes(batches) == pytest.approx(severity, abs=0.1)
    wanted = {10, 30, 50, 70, 90}
    near = {min(wanted, key=lambda w: abs(w - s)) for s in shares}
    left_out = {int(name.split()[2]) for name in conditions.skipped if "composition" in name}
    assert near | left_out == wanted


def test_orders_are_turned_for_the_share_of_documents() -> None:
    conditions, found = made()
    plain = found[CLEAN, 0].batches
    whole = found["modality order", 100].batches
    assert sum(int((~b.is_padding).sum()) for b in plain) == sum(
        int((~b.is_padding).sum()) for b in whole
    )
    assert any(
        not np.array_equal(a.token_ids, b.token_ids) for a, b in zip(plain, whole, strict=False)
    )
    assert any(map(has_picture, conditions.documents))
    assert sum(num_tokens(d)[0] for d in conditions.documents) <= 3 * 4 * 40


def test_lengths_grow_to_the_longest_that_the_model_takes() -> None:
    _, found = made()
    lengths = [severity for shift, severity in found if shift == "sequence length"]
    assert lengths == [40, 80, 128]
    for length in lengths:
        for batch in found["sequence length", length].batches:
            assert batch.token_ids.shape[1] == length


def test_what_the_data_cannot_give_is_said() -> None:
    conditions, found = made()
    assert conditions.skipped["pictures"] == "there are none"  # no image tokenizer
    assert not any(shift == "jpeg" for shift, _ in found)


def test_words_are_corrupted_and_pictures_are_not() -> None:
    _, found = made()
    plain, moved = (found[key].batches for key in ((CLEAN, 0), ("shuffled words", 100)))
    codes = [
        [t for b in batches for t in b.token_ids.flatten().tolist() if 4 <= t < 20]
        for batches in (plain, moved)
    ]
    words = [
        [t for b in batches for t in b.token_ids.flatten().tolist() if t >= 22]
        for batches in (plain, moved)
    ]
    assert codes[0] == codes[1]
    assert words[0] != words[1]
    assert sorted(words[0]) == sorted(words[1])


def test_conditions_are_a_function_of_the_seed() -> None:
    (_, first), (_, again) = made(), made()
    assert first.keys() == again.keys()
    for key, condition in first.items():
        for a, b in zip(condition.batches, again[key].batches, strict=True):
            assert np.array_equal(a.token_ids, b.token_ids)
