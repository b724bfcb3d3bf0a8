"""When requests are due: the statistics of the process, for fixed seeds."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from momaserve.errors import ConfigError
from momaserve_bench.arrivals import arrival_times


def gaps(burstiness: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    times = arrival_times(20_000, rate=50.0, burstiness=burstiness, seed=7)
    return np.diff([0.0, *times])


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_spread_asked_for(burstiness: float) -> None:
    found = gaps(burstiness)
    assert found.mean() == pytest.approx(1 / 50, rel=0.03)
    assert found.std() / found.mean() == pytest.approx(burstiness**-0.5, rel=0.03)


def test_burstiness_one_is_a_poisson_process() -> None:
    found = gaps(1.0)
    for multiple in (0.5, 1.0, 2.0):  # P(gap > x) = exp(-rate * x)
        assert (found > multiple / 50).mean() == pytest.approx(math.exp(-multiple), abs=0.01)
    counts = np.bincount(np.cumsum(found).astype(int))[:-1]  # per second: variance is the mean
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.15)


def test_the_seed_decides() -> None:
    first = arrival_times(50, rate=3.0, burstiness=1.0, seed=1)
    assert first == arrival_times(50, rate=3.0, burstiness=1.0, seed=1)
    assert first != arrival_times(50, rate=3.0, burstiness=1.0, seed=2)
    assert all(earlier < later for earlier, later in pairwise(first))
    # The process does not depend on how long it is watched.
    assert arrival_times(10, rate=3.0, burstiness=1.0, seed=1) == first[:10]


def test_an_infinite_rate_is_all_at_once() -> None:
    assert arrival_times(3, rate=math.inf, burstiness=1.0, seed=0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_rates_that_are_none(rate: float) -> None:
    with pytest.raises(ConfigError, match="--request-rate must be above 0, or inf, got"):
        arrival_times(3, rate=rate, burstiness=1.0, seed=0)


@pytest.mark.parametrize("burstiness", [0.0, -2.0, math.inf, math.nan])
def test_shapes_that_are_none(burstiness: float) -> None:
    with pytest.raises(ConfigError, match="--burstiness must be above 0, got"):
        arrival_times(3, rate=1.0, burstiness=burstiness, seed=0)
