"""Factors on what memory, arithmetic and overhead were thought to cost, learnt from steps."""

from __future__ import annotations

import math
from typing import NamedTuple

MAX_FACTOR = 64.0
"""No factor leaves [1 / MAX_FACTOR, MAX_FACTOR], whatever is measured."""
_MEMORY = 0.98
"""Weight of a step relative to the next one: about fifty steps count."""
_TRUST = 0.02
"""How much a factor stays where it is, in steps that would be made of its share alone."""
_SWEEPS = 8


class Shares(NamedTuple):
    """Seconds of a step by what they are spent on, before any correction."""

    fixed: float
    memory: float
    compute: float


class Correction:
    """Three positive factors, fitted to measured steps with exponentially fading weights.

    The fit is of least squares over steps, each divided by its longer time, measured or
    predicted. So no step can bring more than another: one that took a hundred times too long
    says nearly nothing about the factors, and one that was too short is one step among many. A
    direction in which steps do not differ keeps its factors' ratio. A function of the steps that
    it was given, and of nothing else.
    """

    def __init__(self) -> None:
        self.factors = [1.0, 1.0, 1.0]
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3

    def seconds(self, shares: Shares) -> float:
        """Corrected time of a step."""
        return sum(f * s for f, s in zip(self.factors, shares, strict=True))

    def observe(self, shares: Shares, seconds: float) -> None:
        """Learns from a step that took so long. A time that is none is passed over."""
        if not (math.isfinite(seconds) and seconds > 0):
            return
        scale = max(seconds, self.seconds(shares))
        row = [share / scale for share in shares]
        for i in range(3):
            self._targets[i] = _MEMORY * self._targets[i] + row[i] * seconds / scale
            for j in range(3):
                self._products[i][j] = _MEMORY * self._products[i][j] + row[i] * row[j]
        self._solve()

    def _solve(self) -> None:
        """Coordinate descent inside the bounds, from where the factors are."""
        factors, before = self.factors, tuple(self.factors)
        for _ in range(_SWEEPS):
            for i in range(3):
                row = self._products[i]
                others = sum(row[j] * factors[j] for j in range(3) if j != i)
                best = (self._targets[i] + _TRUST * before[i] - others) / (row[i] + _TRUST)
                factors[i] = min(MAX_FACTOR, max(1 / MAX_FACTOR, best))
