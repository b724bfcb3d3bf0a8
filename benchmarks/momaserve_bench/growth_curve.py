"""A curve that was measured, and whether it grows faster than it should. Knows no engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOLERANCE = 0.15
"""By how much an exponent may pass its limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measurement of a curve."""

    x: float
    y: float
    exponent: float | None
    """Slope from the point before, on logarithmic axes; None for the first one, and where an
    end is not above 0."""
    is_super_linear: bool
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """y over x by rising x, and the exponents between which it should stay.

    "Super-linear" means that the cost, whatever is on the y axis, grows faster than expected. Of
    throughput that is one which falls, for then the time for all requests grows faster than
    their number.
    """

    name: str
    x_name: str
    y_name: str
    lowest: float | None = None
    """Exponent that it should not be below; None is no limit."""
    highest: float | None = None
    points: tuple[Point, ...]

    @classmethod
    def through(
        cls,
        name: str,
        x_name: str,
        y_name: str,
        measured: Sequence[tuple[float, float, Mapping[str, Any]]],
        *,
        lowest: float | None = None,
        highest: float | None = None,
    ) -> Curve:
        """Through (x, y, what else is known) of each point, by rising x."""
        exponents = local_exponents([(x, y) for x, y, _ in measured])
        points = tuple(
            Point(
                x=x,
                y=y,
                exponent=exponent,
                is_super_linear=passes(exponent, lowest, highest),
                details=details,
            )
            for (x, y, details), exponent in zip(measured, exponents, strict=True)
        )
        return cls(
            name=name,
            x_name=x_name,
            y_name=y_name,
            lowest=lowest,
            highest=highest,
            points=points,
        )

    @property
    def marked(self) -> list[float]:
        """x of the points that must be explained."""
        return [point.x for point in self.points if point.is_super_linear]

    def to_dict(self) -> dict[str, Any]:
        """As the report has it."""
        return {
            "x": self.x_name,
            "y": self.y_name,
            "lowest_exponent": self.lowest,
            "highest_exponent": self.highest,
            "points": [
                {
                    self.x_name: int(point.x) if point.x == int(point.x) else point.x,
                    self.y_name: point.y,
                    "exponent": point.exponent,
                    "is_super_linear": point.is_super_linear,
                    **point.details,
                }
                for point in self.points
            ],
        }


def local_exponents(points: Sequence[tuple[float, float]]) -> list[float | None]:
    """For each (x, y) the b of y ~ x^b through it and the one before: 1 is linear growth."""
    exponents: list[float | None] = [None for _ in points[:1]]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        is_known = min(x0, y0, x1, y1) > 0 and x0 != x1
        exponents.append(math.log(y1 / y0) / math.log(x1 / x0) if is_known else None)
    return exponents


def passes(exponent: float | None, lowest: float | None, highest: float | None) -> bool:
    """Whether an exponent is beyond a limit by more than the tolerance."""
    if exponent is None:
        return False
    is_above = highest is not None and exponent > highest + TOLERANCE
    is_below = lowest is not None and exponent < lowest - TOLERANCE
    return is_above or is_below


def doublings(first: int, last: int, *, with_last: bool = False) -> list[int]:
    """`first`, twice that, … up to `last`; only `last` if `first` is beyond it.

    Args:
        with_last: whether `last` itself ends the list.
    """
    values: list[int] = []
    value = first
    while value <= last:
        values.append(value)
        value *= 2
    if not values or (with_last and values[-1] != last):
        values.append(last)
    return values
