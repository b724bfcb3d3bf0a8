"""Learning what memory, arithmetic and overhead cost from steps that were measured."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator

import pytest

from momaserve.core.correction import MAX_FACTOR, Correction, Shares

TRUTHS = [(1.0, 1.0, 1.0), (3.0, 2.5, 0.6), (0.4, 0.3, 4.0), (8.0, 1.2, 1.0), (1.0, 10.0, 10.0)]


def random_steps(seed: int, count: int) -> Iterator[Shares]:
    """Decoding, mostly reading; and now and then a prompt, mostly computing."""
    dice = random.Random(seed)
    for _ in range(count):
        compute = dice.uniform(0.5, 3.0) if dice.random() < 0.2 else 0.0
        yield Shares(0.1, dice.uniform(0.3, 1.5), compute)


def true_seconds(truth: tuple[float, float, float], shares: Shares) -> float:
    return sum(f * s for f, s in zip(truth, shares, strict=True))


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_converges_to_another_truth(truth: tuple[float, float, float], seed: int) -> None:
    correction, dice = Correction(), random.Random(seed)
    errors = []
    for shares in random_steps(seed, 300):
        seconds = true_seconds(truth, shares) * math.exp(dice.gauss(0.0, 0.1))
        errors.append(abs(correction.seconds(shares) - seconds) / seconds)
        correction.observe(shares, seconds)
    assert statistics.median(errors) <= 0.15
    assert statistics.median(errors[-100:]) <= 0.10


@pytest.mark.parametrize("factor", [100.0, 1000.0, 0.01, 0.0001])
def test_a_step_that_is_out_of_line_changes_little(factor: float) -> None:
    correction = Correction()
    for shares in random_steps(0, 100):
        correction.observe(shares, true_seconds((2.0, 2.0, 2.0), shares))
    usual = Shares(0.1, 1.0, 0.0)
    before = correction.seconds(usual)
    correction.observe(usual, factor * before)
    assert correction.seconds(usual) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("factor", [200.0, 1e-9])
def test_factors_stay_within_their_bounds(factor: float) -> None:
    correction = Correction()
    for shares in random_steps(0, 300):
        correction.observe(shares, factor * true_seconds((1.0, 1.0, 1.0), shares))
        assert all(1 / MAX_FACTOR <= f <= MAX_FACTOR for f in correction.factors)
    bound = MAX_FACTOR if factor > 1 else 1 / MAX_FACTOR
    assert correction.factors == pytest.approx([bound] * 3, rel=0.05)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_time_that_is_none_is_passed_over(seconds: float) -> None:
    correction = Correction()
    correction.observe(Shares(0.1, 1.0, 1.0), 2.0)
    before = list(correction.factors)
    correction.observe(Shares(0.1, 1.0, 1.0), seconds)
    assert correction.factors == before


def test_steps_that_never_differ_are_predicted_nevertheless() -> None:
    correction = Correction()
    for _ in range(50):
        correction.observe(Shares(0.1, 1.0, 0.5), 4.8)
    assert correction.seconds(Shares(0.1, 1.0, 0.5)) == pytest.approx(4.8, rel=0.01)


def test_a_change_of_the_machine_is_followed() -> None:
    correction = Correction()
    for shares in random_steps(0, 200):
        correction.observe(shares, true_seconds((1.0, 1.0, 1.0), shares))
    for shares in random_steps(1, 300):
        correction.observe(shares, true_seconds((1.0, 3.0, 1.0), shares))
    assert correction.factors[1] == pytest.approx(3.0, rel=0.05)
