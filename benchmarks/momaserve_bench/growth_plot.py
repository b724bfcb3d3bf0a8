"""The four curves of `bench growth` as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from momaserve.errors import ConfigError
from momaserve.training.plot import new_figure, save_figure
from momaserve_bench.growth_curve import Curve

# Okabe and Ito's colours, which colour-blind eyes tell apart; shapes differ as well.
_STYLES = (("#0072B2", "o-"), ("#D55E00", "s--"))
_MARK = "#000000"
_GUIDE = "#999999"
_MIB = 1 << 20


def draw(
    throughput: Curve,
    first_token: Curve,
    decoding: Curve,
    memory: tuple[Curve, Curve],
    path: Path,
) -> None:
    """Writes a PNG with four panels, both axes logarithmic.

    Raises:
        ConfigError: the file cannot be written, or there is no matplotlib.
    """
    figure = new_figure(2)
    figure.set_size_inches(12.8, 9.6)
    panels = figure.subplots(2, 2)
    _panel(
        panels[0, 0],
        {"measured": throughput},
        "requests at the same time",
        "output tokens per second",
    )
    _panel(panels[0, 1], {"measured": first_token}, "prompt tokens", "time to first token in ms")
    _panel(panels[1, 0], {"measured": decoding}, "tokens in sight", "ms per decoded token")
    curves = dict(zip(("KV blocks in use", "the whole process"), memory, strict=True))
    _panel(panels[1, 1], curves, "tokens held", "memory in MiB", unit=_MIB)
    try:
        save_figure(figure, path)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from None


def _panel(
    axes: Any, curves: dict[str, Curve], x_label: str, y_label: str, *, unit: float = 1.0
) -> None:
    has_mark = False
    for (name, curve), (colour, style) in zip(curves.items(), _STYLES, strict=False):
        points = [(p.x, p.y / unit, p) for p in curve.points if p.x > 0 and p.y > 0]
        if not points:
            continue
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], style, color=colour,
                  label=name)  # fmt: skip
        marked = [(x, y) for x, y, point in points if point.is_super_linear]
        if marked:
            label = None if has_mark else "super-linear"
            axes.plot(*zip(*marked, strict=True), "x", color=_MARK, ms=12, mew=2, label=label)
            has_mark = True
    first = next(iter(curves.values()))
    limit = first.highest if first.highest is not None else first.lowest
    start = next(((p.x, p.y / unit) for p in first.points if p.x > 0 and p.y > 0), None)
    if limit is not None and start is not None and len(first.points) > 1:
        xs = [start[0], first.points[-1].x]
        ys = [start[1] * (x / start[0]) ** limit for x in xs]
        what = "most" if first.highest is not None else "least"
        axes.plot(xs, ys, ":", color=_GUIDE, label=f"exponent {limit:g}, the {what} expected")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [point.x for point in first.points if point.x > 0]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    heights = round_numbers([float(y) for line in axes.lines for y in line.get_ydata()])
    if heights:
        axes.set_yticks(heights, [f"{y:g}" for y in heights])
        axes.set_ylim(heights[0], heights[-1])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, color="#dddddd")
    if axes.lines:
        axes.legend()


def round_numbers(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten around positive values; nothing around none."""
    if not values:
        return []
    low, high = min(values), max(values)
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    numbers = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    first = max(i for i, number in enumerate(numbers) if number <= low)
    last = next(i for i, number in enumerate(numbers) if number >= high)
    return numbers[first : max(last, first + 1) + 1]
