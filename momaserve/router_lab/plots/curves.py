"""Losses against noise, against compute, and against the severity of a shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from momaserve.router_lab.plots.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    line,
    new_figure,
    symmetric_log,
    value_of,
)

_CURVES = {
    ("expert_choice", "uniform"): ("any decision", BLACK, "o-"),
    ("expert_choice", "drop"): ("selected pairs dropped", RED, "v--"),
    ("expert_choice", "add"): ("other pairs added", GREEN, "^--"),
    ("causal", "uniform"): ("any decision, of causal", BLUE, "s:"),
    ("calibrated", "uniform"): ("any decision, of calibrated", ORANGE, "D:"),
}
_FAMILIES = {
    "expert_choice": ("expert choice, other capacity", BLACK, "o-"),
    "aux_global": ("auxiliary routers, one cut", BLUE, "s--"),
    "aux_per_expert": ("auxiliary routers, cut per expert", SKY, "s-"),
    "calibrated_offset": ("thresholds, shifted together", RED, "D--"),
    "calibrated_per_expert": ("thresholds, cut per expert", ORANGE, "D-"),
}
_SINGULAR = {"experts": "expert", "depth": "depth"}
_BELOW = 0.05
"""Nat below zero that plots show: gains are small, and their intervals no reason to zoom out."""
_SERVED_SETTINGS = {"aux_global": 0.5, "calibrated_offset": 0.0}
"""Where a sweep passes through what is served."""


def draw_noise(parts: Mapping[str, Any]) -> Any:
    """A row per part (experts, depth), a column per modality."""
    if "noise" not in parts:
        return None
    found = parts["noise"]
    names = list(dict.fromkeys(curve["part"] for curve in found["curves"]))
    modalities = _modalities(found["curves"][0]["points"][0]["loss"]) if names else []
    if not modalities:
        return None
    figure = new_figure(4.7 * len(modalities), 3.5 * len(names) + 0.9)
    grid = figure.subplots(len(names), len(modalities), squeeze=False)
    for part, row in zip(names, grid, strict=True):
        for modality, axes in zip(modalities, row, strict=True):
            for curve in found["curves"]:
                if curve["part"] == part:
                    _noise_curve(axes, curve, modality)
            _floor(axes, found["floor"], part)
            axes.axvline(0.5, color=GREY, linewidth=1, linestyle=(0, (1, 1)))
            axes.text(
                0.5,
                0.985,
                " 0.5 %",
                transform=axes.get_xaxis_transform(),
                color="#666666",
                fontsize=7,
                va="top",
            )
            lowest = -_BELOW
            if found["baseline"] is not None:
                lowest = min(lowest, 1.2 * _baseline(axes, found, modality))
            axes.set_xscale("log")
            axes.set_xticks([0.1, 0.25, 0.5, 1, 2, 5, 10, 20])
            axes.set_xticklabels(["0.1", "0.25", "0.5", "1", "2", "5", "10", "20"])
            axes.minorticks_off()
            symmetric_log(axes, "y", 0.01)
            axes.axhline(0, color=BLACK, linewidth=0.8)
            axes.set_ylim(bottom=max(axes.get_ylim()[0], lowest))
            axes.set_title(f"{modality} tokens: noise in {_SINGULAR[part]} decisions")
            axes.set_xlabel("decisions turned around, σ (%)")
            axes.set_ylabel("loss above no noise (nat per token)")
    _legend_below(figure, grid)
    return figure


def _legend_below(figure: Any, grid: Any) -> None:
    """One legend for all plots, each label once."""
    found: dict[str, Any] = {}
    for axes in grid.flat:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=3)


def _noise_curve(axes: Any, curve: Mapping[str, Any], modality: str) -> None:
    label, colour, mark = _CURVES[curve["base"], curve["kind"]]
    points = [point for point in curve["points"] if point["sigma"] > 0]
    deltas = [point["loss"][modality]["delta"] for point in points]
    if points:
        xs = [100 * point["sigma"] for point in points]
        line(axes, xs, deltas, color=colour, label=label, **_mark(mark))


def _floor(axes: Any, floors: Mapping[str, Any], part: str) -> None:
    """The share of decisions that bfloat16 alone turns, of the most and the least sensitive."""
    rates = [100 * each[part] for each in floors.values() if each[part]]
    if rates:
        axes.axvspan(
            0.85 * min(rates),
            1.15 * max(rates),
            color=PURPLE,
            alpha=0.22,
            linewidth=0,
            label=f"bf16 rounding alone ({part}): {min(rates):.2f} to {max(rates):.2f} %",
        )


def _baseline(axes: Any, found: Mapping[str, Any], modality: str) -> float:
    """Draws how far the other model is above this one without noise, and returns it."""
    clean = next(c for c in found["curves"] if c["base"] == "expert_choice")["points"][0]
    above = value_of(found["baseline"][modality]) - value_of(clean["loss"][modality]["nll"])
    axes.axhline(above, color=GREY, linewidth=1.2, linestyle="-.", label="model without depth")
    return above


def _mark(mark: str) -> dict[str, Any]:
    """ "o--" as keywords of `plot`."""
    return {"marker": mark[0], "linestyle": mark[1:]}


def _modalities(loss: Mapping[str, Any]) -> list[str]:
    return [name for name in ("text", "image") if name in loss and loss[name]["nll"]["value"]]


def draw_thresholds(parts: Mapping[str, Any]) -> Any:
    """Loss against mean experts per token (of depth: the share taken)."""
    if "thresholds" not in parts or not parts["thresholds"]["sweeps"]:
        return None
    found = parts["thresholds"]
    names = list(dict.fromkeys(sweep["part"] for sweep in found["sweeps"]))
    modalities = _modalities(found["sweeps"][0]["points"][0]["loss"])
    if not modalities:
        return None
    figure = new_figure(4.7 * len(modalities), 3.5 * len(names) + 0.9)
    grid = figure.subplots(len(names), len(modalities), squeeze=False)
    for part, row in zip(names, grid, strict=True):
        for modality, axes in zip(modalities, row, strict=True):
            for sweep in found["sweeps"]:
                if sweep["part"] == part:
                    _sweep(axes, sweep, modality, part)
            axes.axhline(0, color=BLACK, linewidth=0.8)
            symmetric_log(axes, "y", 0.01)
            axes.set_ylim(bottom=max(axes.get_ylim()[0], -_BELOW))
            axes.set_title(f"{modality} tokens: cuts of {_SINGULAR[part]} routers")
            of_layer = "share of tokens that a layer takes"
            axes.set_xlabel("mean experts per token" if part == "experts" else of_layer)
            axes.set_ylabel("loss above the training condition\n(nat per token)")
    served = {"marker": "*", "linestyle": "", "markersize": 11}
    grid.flat[0].plot([], [], color=GREY, label="as served", **served)
    _legend_below(figure, grid)
    return figure


def _sweep(axes: Any, sweep: Mapping[str, Any], modality: str, part: str) -> None:
    label, colour, mark = _FAMILIES[sweep["family"]]
    xs = [_compute(point["experts_per_token"], modality, part) for point in sweep["points"]]
    deltas = [point["loss"][modality]["delta"] for point in sweep["points"]]
    line(axes, xs, deltas, color=colour, label=label, **_mark(mark))
    served = _SERVED_SETTINGS.get(sweep["family"])
    for x, point, delta in zip(xs, sweep["points"], deltas, strict=True):
        if point["setting"] == served:
            axes.plot(
                [x],
                [value_of(delta)],
                "*",
                color=colour,
                markersize=13,
                markeredgecolor="white",
                zorder=5,
            )


def _compute(experts_per_token: Mapping[str, float], modality: str, part: str) -> float:
    """Of the group named as the modality, if there is one, else the mean over groups."""
    if part == "depth":
        return experts_per_token["depth"]
    groups = {kind: n for kind, n in experts_per_token.items() if kind != "depth"}
    return groups.get(modality, sum(groups.values()) / len(groups))


def draw_shift(parts: Mapping[str, Any]) -> Any:
    """A column per shift: agreement with the oracle, loss, and what serving adds to it."""
    if "shift" not in parts or not parts["shift"]["shifts"]:
        return None
    clean, shifts = parts["shift"]["clean"], parts["shift"]["shifts"]
    columns = 5
    bands = -(-len(shifts) // columns)
    figure = new_figure(2.75 * columns, 6.4 * bands)
    for band, sub in enumerate(_halves(figure, bands)):
        names = list(shifts)[band * columns : (band + 1) * columns]
        grid = sub.subplots(3, columns, squeeze=False, sharex="col", sharey="row")
        for column in range(columns):
            if column >= len(names):
                for axes in grid[:, column]:
                    axes.set_axis_off()
                continue
            points = shifts[names[column]]["points"]
            if names[column] not in ("batch composition", "sequence length"):
                points = [clean, *points]
            unit = shifts[names[column]]["unit"]
            _shift_column(grid[:, column], names[column], points, unit, is_first=column == 0)
    return figure


def _halves(figure: Any, bands: int) -> Sequence[Any]:
    found = figure.subfigures(bands, 1)
    return [found] if bands == 1 else list(found)


def _shift_column(
    column: Sequence[Any], name: str, points: Sequence[Any], unit: str, *, is_first: bool
) -> None:
    top, middle, bottom = column
    xs = [point["severity"] for point in points]
    styles = {"causal": "-", "calibrated": "--"}
    colours = {"text": BLUE, "image": ORANGE, "depth": GREEN}
    for policy, agreement in points[0]["agreement"].items():
        for kind in agreement:
            kept = [
                (x, p) for x, p in zip(xs, points, strict=True) if kind in p["agreement"][policy]
            ]
            line(
                top,
                [x for x, _ in kept],
                [p["agreement"][policy][kind]["f1"] for _, p in kept],
                color=colours.get(kind, GREY),
                linestyle=styles[policy],
                marker="o" if policy == "causal" else "D",
                label=f"{kind}, {policy}",
                with_band=policy == "causal",
            )
    for modality in _modalities(points[0]["loss"]["expert_choice"]):
        colour = colours[modality]
        nll = [p["loss"]["expert_choice"][modality]["nll"] for p in points]
        line(middle, xs, nll, color=colour, marker="o", label=modality)
        for policy in points[0]["agreement"]:
            deltas = [p["loss"][policy][modality]["delta"] for p in points]
            look = {"linestyle": styles[policy], "marker": "o" if policy == "causal" else "D"}
            is_banded = policy == "causal"
            line(bottom, xs, deltas, color=colour, with_band=is_banded, **look)
    bottom.axhline(0, color=BLACK, linewidth=0.8)
    symmetric_log(bottom, "y", 0.02)
    top.set_title(name)
    bottom.set_xlabel(unit)
    if name == "sequence length":
        bottom.set_xscale("log", base=2)
        bottom.set_xticks(xs, [f"{x:g}" for x in xs])
        bottom.minorticks_off()
    if is_first:
        top.set_ylabel("F1 against expert choice")
        middle.set_ylabel("loss, expert choice\n(nat per token)")
        bottom.set_ylabel("loss above expert\nchoice (nat per token)")
        middle.legend(fontsize=6.5)
        if top.lines:
            top.legend(fontsize=6.5, loc="lower left")
