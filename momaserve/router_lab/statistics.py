"""Honest error bars: bootstrap over documents, an exact paired test, where two curves cross.

A document is the unit that is drawn again: its tokens are not independent. Whatever is estimated
is a function of sums over documents, so a resample is one product with a matrix of counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sums = NDArray[np.float64]
"""[D, C]: C sums (losses, counts) of each of D documents."""
Statistic = Callable[..., NDArray[np.float64]]
"""Arrays [..., C], one for each of the sums it is given -> [...]."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % interval; None where there is nothing to tell it from.

    A bound may be infinite, which report.json has as null.
    """

    value: float | None
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


class Bootstrap:
    """Percentile intervals (95 %) over resampled documents.

    All estimates of one bootstrap over as many documents share their resamples, so differences
    of two passes over the same documents are paired.
    """

    def __init__(self, replicates: int, seed: int) -> None:
        self.replicates = replicates
        self.seed = seed
        self._counts: dict[int, NDArray[np.float64]] = {}

    def counts(self, num_documents: int) -> NDArray[np.float64]:
        """[R, D]: how often each resample has each document; rows sum to D."""
        if num_documents not in self._counts:
            generator = np.random.default_rng([self.seed, num_documents])
            shares = np.full(num_documents, 1 / num_documents)
            drawn = generator.multinomial(num_documents, shares, size=self.replicates)
            self._counts[num_documents] = drawn.astype(np.float64)
        return self._counts[num_documents]

    def estimate(self, statistic: Statistic, *sums: Sums) -> Estimate:
        """A statistic of one or several sums over the same documents, and its interval.

        Resamples in which it is no number are left out, infinite ones are not; with fewer than
        two documents, or too few such resamples, there is no interval.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(*(each.sum(0) for each in sums)))
            if not math.isfinite(value):
                return Estimate(None)
            if len(sums[0]) < 2:
                return Estimate(value)
            counts = self.counts(len(sums[0]))
            found = statistic(*(counts @ each for each in sums))
        found = np.sort(found[~np.isnan(found)])
        if 2 * len(found) < self.replicates:
            return Estimate(value)
        # Resamples themselves, never something between two: one of them may be infinite.
        low, high = math.floor(0.025 * (len(found) - 1)), math.ceil(0.975 * (len(found) - 1))
        return Estimate(value, float(found[low]), float(found[high]))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test: were both equally good, how surprising is it?

    Args:
        only_first: pairs that the first got right and the second wrong.
        only_second: the reverse.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    p: float = 2 * tail / 2**total
    return min(1.0, p)


def crossing(xs: Sequence[float], ys: NDArray[Any], level: NDArray[Any]) -> NDArray[np.float64]:
    """The smallest x at which each curve reaches its level, on straight lines between points.

    Args:
        xs: [P] rising.
        ys: [..., P] curves.
        level: [...].

    Returns:
        [...]; `xs[0]` where a curve begins at its level or above, infinity where it never gets
        there.
    """
    x, above = np.asarray(xs, dtype=np.float64), ys >= level[..., None]
    index = np.where(above.any(-1), above.argmax(-1), 0)
    before = np.maximum(index - 1, 0)
    low = np.take_along_axis(ys, before[..., None], -1)[..., 0]
    high = np.take_along_axis(ys, index[..., None], -1)[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(high > low, (level - low) / (high - low), 0.0)
    found = x[before] + share * (x[index] - x[before])
    found = np.where(index == 0, x[0], found)
    return np.where(above.any(-1), found, np.inf)
