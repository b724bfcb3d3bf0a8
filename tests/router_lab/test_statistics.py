"""Intervals of a known distribution, an exact test by hand, where curves cross."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from momaserve.router_lab.statistics import Bootstrap, crossing, mcnemar


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = sums[..., 0] / sums[..., 1]
    return found


def with_counts(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([values, np.ones_like(values)], axis=1)


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(5).normal(3.0, 2.0, 400)
    found = Bootstrap(4000, seed=1).estimate(ratio, with_counts(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low is not None
    assert found.high is not None
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.08 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.08 * half)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(11)
    hits = 0
    for seed in range(200):
        sample = with_counts(generator.exponential(1.0, 60))
        found = Bootstrap(300, seed).estimate(ratio, sample)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert 178 <= hits <= 198  # 95 % less what skewness and 60 values cost


def test_paired_differences_are_narrower_than_their_parts() -> None:
    generator = np.random.default_rng(2)
    first = generator.normal(5.0, 3.0, 100)
    second = first + generator.normal(0.1, 0.01, 100)
    bootstrap = Bootstrap(500, 0)
    found = bootstrap.estimate(
        lambda a, b: ratio(a) - ratio(b), with_counts(second), with_counts(first)
    )
    assert found.value == pytest.approx(0.1, abs=0.01)
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 0.01
    same = bootstrap.estimate(lambda a, b: ratio(a) - ratio(b), *[with_counts(first)] * 2)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_long_documents_count_by_their_tokens() -> None:
    """The mean is over tokens, and a resample without the long one misses much."""
    sums = np.array([[90.0, 90.0], [0.0, 5.0], [0.0, 5.0]])
    found = Bootstrap(400, 0).estimate(ratio, sums)
    assert found.value == 0.9
    assert found.low == 0.0
    assert found.high == 1.0


def test_there_is_no_interval_without_documents_to_draw_from() -> None:
    bootstrap = Bootstrap(50, 0)
    alone = bootstrap.estimate(ratio, np.array([[3.0, 2.0]]))
    assert (alone.value, alone.low, alone.high) == (1.5, None, None)
    empty = bootstrap.estimate(ratio, np.zeros((4, 2)))
    assert (empty.value, empty.low, empty.high) == (None, None, None)
    # With one document in five hundred to tell it from, most resamples may have nothing.
    rare = np.zeros((500, 2))
    rare[0] = 1
    few = Bootstrap(50, 0)
    few._counts[500] = np.zeros((50, 500))
    few._counts[500][:20, 0] = 1
    assert few.estimate(ratio, rare).low is None
    few._counts[500][:30, 0] = 1
    assert few.estimate(ratio, rare).low == 1.0


def test_a_bound_that_some_resamples_never_reach_is_infinite() -> None:
    """Half of the documents never lose 1 %: neither do many resamples."""
    clean, noisy = np.ones((6, 2)), np.ones((6, 2))
    noisy[:3, 0] = 1.03

    def statistic(*sums: NDArray[np.float64]) -> NDArray[np.float64]:
        curve = np.stack([ratio(each) for each in sums], axis=-1)
        return crossing([0.0, 1.0], curve, 1.01 * curve[..., 0])

    found = Bootstrap(500, 0).estimate(statistic, clean, noisy)
    assert found.value == pytest.approx(2 / 3)
    assert found.low is not None
    assert 0.3 < found.low < 0.5
    assert found.high == math.inf


def test_resamples_are_a_function_of_the_seed() -> None:
    first, again, other = (Bootstrap(20, seed).counts(7) for seed in (4, 4, 5))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (first.sum(1) == 7).all()
    assert first.shape == (20, 7)


@pytest.mark.parametrize(
    ("counts", "p"),
    [
        ((0, 0), 1.0),
        ((3, 3), 1.0),
        ((0, 5), 2 / 32),
        ((5, 0), 2 / 32),
        ((1, 5), 2 * 7 / 64),
        ((2, 9), 2 * (1 + 11 + 55) / 2048),
        ((0, 6), 2 / 64),
    ],
)
def test_mcnemar_by_hand(counts: tuple[int, int], p: float) -> None:
    assert mcnemar(*counts) == pytest.approx(p, rel=1e-12)


def test_crossings_by_hand() -> None:
    xs = [0.0, 1.0, 2.0, 4.0]
    curves = np.array(
        [
            [0.0, 1.0, 2.0, 4.0],  # half-way between the second and the third point
            [2.0, 0.0, 0.0, 0.0],  # there from the start
            [0.0, 0.0, 0.0, 1.0],  # never
            [0.0, 3.0, 0.0, 3.0],  # the first time counts
        ]
    )
    levels = np.array([1.5, 1.5, 1.5, 1.5])
    assert crossing(xs, curves, levels).tolist() == [1.5, 0.0, math.inf, 0.5]
    assert crossing(xs, curves[:1], np.array([4.0])).tolist() == [4.0]
