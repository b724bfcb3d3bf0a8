"""`loss.png` beside a run's log: losses by modality over the FLOPs spent.

matplotlib is an extra (`pip install 'momaserve[train]'`); without it training goes on unplotted.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from momaserve.errors import ConfigError
from momaserve.training.run import read_log

MISSING = "drawing needs matplotlib: pip install 'momaserve[train]'"
_COLOURS = {"text": "tab:blue", "image": "tab:orange"}


def new_figure(columns: int = 1) -> Any:
    """An empty matplotlib figure, `columns` plots wide, that belongs to no screen.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        figures: Any = import_module("matplotlib.figure")
    except ModuleNotFoundError:
        raise ConfigError(MISSING) from None
    return figures.Figure(figsize=(6.4 * columns, 4.8), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=100)
    os.replace(temporary, path)


@cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr)


def plot_losses(directory: Path) -> None:
    """Draw `loss.png` of a run; says so once, and draws nothing, without matplotlib."""
    records = [record for record in read_log(directory) if "flops" in record]
    try:
        figure = new_figure()
    except ConfigError as error:
        _say_once(f"no loss.png: {error}")
        return
    axes = figure.subplots()
    for name, colour in _COLOURS.items():
        for prefix, style in (("", "-"), ("valid_", "o--")):
            key = f"{prefix}{name}_nll"
            points = [(r["flops"], r[key]) for r in records if key in r]
            if points:
                label = f"{name}, {'validation' if prefix else 'training'}"
                axes.plot(*zip(*points, strict=True), style, color=colour, label=label, ms=3)
    axes.set_xlabel("training FLOPs")
    axes.set_ylabel("loss in nat per token")
    if axes.lines:
        axes.legend()
    save_figure(figure, directory / "loss.png")
