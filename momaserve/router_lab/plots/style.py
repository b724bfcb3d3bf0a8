"""How plots look: colours that colour-blind readers tell apart (Okabe and Ito), sizes, marks.

matplotlib is an extra (`pip install 'momaserve[train]'`); only `new_figure` and `styled` need it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from momaserve.errors import ConfigError
from momaserve.training.plot import MISSING

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PURPLE, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999"
EXPERT_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, BLACK)
POLICY_COLOURS = {
    "expert_choice": BLACK,
    "expert_choice_prompt": GREEN,
    "causal": BLUE,
    "calibrated": RED,
    "threshold": ORANGE,
    "random": PURPLE,
    "all": SKY,
}
LABELS = {
    "expert_choice": "expert choice\n(training condition)",
    "expert_choice_prompt": "expert choice over the\nprompt, then causal",
    "causal": "causal (auxiliary routers)",
    "calibrated": "calibrated thresholds",
    "threshold": "threshold 0.5",
    "random": "random, same rate",
    "all": "all experts",
}
SPLITS = {"train": "training data", "held_out": "held-out data"}
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_DPI = 150


def _matplotlib(module: str = "") -> Any:
    try:
        return import_module("matplotlib" + module)
    except ModuleNotFoundError:
        raise ConfigError(MISSING) from None


@contextmanager
def styled() -> Iterator[None]:
    """Everything drawn inside looks alike. Raises ConfigError without matplotlib."""
    with _matplotlib().rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches, which belongs to no screen."""
    return _matplotlib(".figure").Figure(figsize=(width, height), layout="constrained")


def rectangle(corner: tuple[float, float], width: float, height: float, **look: Any) -> Any:
    """A patch for `add_patch`, in the data's coordinates."""
    return _matplotlib(".patches").Rectangle(corner, width, height, **look)


def colour_map(name: str) -> Any:
    return _matplotlib().colormaps[name]


def save(figure: Any, path: Path) -> None:
    """A PNG file, written atomically; equal figures give equal bytes."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
    os.replace(temporary, path)


def kinds_in(groups: Sequence[str]) -> list[str]:
    """Kinds of routers in the order of plots: depth first, as it decides first."""
    return [k for k in groups if k == "depth"] + [k for k in groups if k != "depth"]


def bounds(estimate: Mapping[str, float | None]) -> tuple[float, float]:
    """The interval, or the value twice where there is none."""
    value = estimate["value"] if estimate["value"] is not None else float("nan")
    low, high = estimate["low"], estimate["high"]
    return (value if low is None else low, value if high is None else high)


def value_of(estimate: Mapping[str, float | None]) -> float:
    value = estimate["value"]
    return float("nan") if value is None else value


def line(
    axes: Any,
    xs: Sequence[float],
    estimates: Sequence[Mapping[str, Any]],
    *,
    with_band: bool = True,
    **look: Any,
) -> None:
    """Points joined by a line, their intervals as a band."""
    pairs = sorted(zip(xs, estimates, strict=True), key=lambda pair: pair[0])
    xs = [x for x, _ in pairs]
    axes.plot(xs, [value_of(each) for _, each in pairs], **look)
    if not with_band:
        return
    low, high = zip(*(bounds(each) for _, each in pairs), strict=True)
    axes.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)


def symmetric_log(axes: Any, axis: str, threshold: float) -> None:
    """A scale that is linear near zero and logarithmic beyond `threshold`."""
    getattr(axes, f"set_{axis}scale")("symlog", linthresh=threshold)
    ticker = _matplotlib(".ticker")
    which = axes.xaxis if axis == "x" else axes.yaxis
    which.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    which.set_minor_locator(ticker.NullLocator())
