"""The pictures of a report, from its plain values: PNG files that stand on their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from momaserve.router_lab.plots.curves import draw_noise, draw_shift, draw_thresholds
from momaserve.router_lab.plots.maps import draw_routing
from momaserve.router_lab.plots.policies import (
    draw_accuracy,
    draw_calibration,
    draw_losses,
    draw_use,
)
from momaserve.router_lab.plots.style import save, styled

PLOTS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "losses": draw_losses,
    "accuracy": draw_accuracy,
    "calibration": draw_calibration,
    "use": draw_use,
    "routing": draw_routing,
    "noise": draw_noise,
    "thresholds": draw_thresholds,
    "shift": draw_shift,
}
"""Each takes the report's `parts` and gives a figure, or None where there is nothing to show."""


def draw_all(report: Mapping[str, Any], out: Path) -> dict[str, Path]:
    """Draw what the parts of a report allow; the files by name.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    found: dict[str, Path] = {}
    for name, draw in PLOTS.items():
        path = out / f"{name}.png"
        with styled():
            figure = draw(report["parts"])
            if figure is None:
                path.unlink(missing_ok=True)  # of parts that are no more
                continue
            save(figure, path)
        found[name] = path
    return found
