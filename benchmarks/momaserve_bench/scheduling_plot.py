"""A picture of what router-aware scheduling gains: one bar for each point of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from momaserve.training.plot import save_figure


def plot(figure: Any, names: Sequence[str], ratios: Sequence[float], path: Path) -> None:
    """Writes a PNG of tokens/s, router-aware over first come, first served.

    Args:
        figure: an empty one (`momaserve.training.plot.new_figure`).
    """
    figure.set_size_inches(8, 0.25 * len(names) + 1.2)
    axes = figure.subplots()
    axes.barh(names, ratios, color="tab:blue")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlim(left=min(0.9, *ratios))
    axes.set_xlabel("tokens/s, router-aware over first come, first served")
    axes.invert_yaxis()
    save_figure(figure, path)
