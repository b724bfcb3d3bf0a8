"""Losses by policy, and how well routers imitate the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from momaserve.router_lab.losses import MARGIN_NAT, MARGIN_SHARE
from momaserve.router_lab.plots.style import (
    BLACK,
    BLUE,
    GREY,
    LABELS,
    ORANGE,
    POLICY_COLOURS,
    SPLITS,
    bounds,
    colour_map,
    kinds_in,
    new_figure,
    rectangle,
    symmetric_log,
    value_of,
)

_SPLIT_COLOURS = {"train": BLUE, "held_out": ORANGE}


def draw_losses(parts: Mapping[str, Any]) -> Any:
    """Differences from the training condition by policy, with what counts as no difference."""
    if "policies" not in parts:
        return None
    splits = parts["policies"]["splits"]
    names = [name for name in next(iter(splits.values()))["loss"] if name != "expert_choice"]
    found = next(iter(splits.values()))["loss"]["expert_choice"]
    modalities = [m for m in ("text", "image") if m in found]
    figure = new_figure(4.6 * len(modalities) + 1.2, 1.9 + 0.42 * len(names))
    grid = figure.subplots(1, len(modalities), sharey=True, squeeze=False)[0]
    for axes, modality in zip(grid, modalities, strict=True):
        title = []
        for shift, (split, report) in zip((-0.16, 0.16), splits.items(), strict=False):
            if modality in report["loss"]["expert_choice"]:
                _loss_points(axes, report["loss"], names, modality, split, shift)
                nll = value_of(report["loss"]["expert_choice"][modality]["nll"])
                title.append(f"{nll:.4g} ({SPLITS[split]})")
        axes.axvline(0, color=BLACK, linewidth=0.8)
        symmetric_log(axes, "x", 0.01)
        axes.set_title(f"{modality} tokens\nexpert choice: {', '.join(title)}", fontsize=9)
        axes.set_xlabel("loss above the training condition (nat per token)")
    grid[0].set_yticks(range(len(names)), [LABELS[name] for name in names])
    grid[0].invert_yaxis()
    handles = [grid[0].patches[0], *grid[0].containers]
    labels = ["no more than 1 % or 0.005 nat", *(c.get_label() for c in grid[0].containers)]
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _loss_points(
    axes: Any,
    losses: Mapping[str, Any],
    names: Sequence[str],
    modality: str,
    split: str,
    shift: float,
) -> None:
    """Differences of one split with their intervals, over what counts as no difference."""
    margin = max(MARGIN_NAT, MARGIN_SHARE * value_of(losses["expert_choice"][modality]["nll"]))
    deltas = [losses[name][modality]["delta"] for name in names]
    values = np.array([value_of(each) for each in deltas])
    reach = np.array([bounds(each) for each in deltas])
    places = np.arange(len(names)) + shift
    for place in places:
        band = (-margin, place - 0.13), 2 * margin, 0.26
        axes.add_patch(rectangle(*band, facecolor=GREY, alpha=0.35, linewidth=0))
    axes.errorbar(
        values,
        places,
        xerr=np.abs(reach - values[:, None]).T,
        fmt="o" if split == "train" else "s",
        color=_SPLIT_COLOURS[split],
        markerfacecolor=_SPLIT_COLOURS[split] if split == "train" else "white",
        capsize=2.5,
        elinewidth=1.2,
        label=f"{SPLITS[split]}, 95 % over documents",
    )


def draw_accuracy(parts: Mapping[str, Any]) -> Any:
    """Heat maps layer x expert of the two servable policies, on training data."""
    if "policies" not in parts:
        return None
    rows = parts["policies"]["splits"]["train"]["routers"]
    policies = [p for p in ("causal", "calibrated") if any(r["policy"] == p for r in rows)]
    kinds = kinds_in(list(dict.fromkeys(row["kind"] for row in rows)))
    if not policies or not kinds:
        return None
    rows = [row for row in rows if row["policy"] in policies]
    values = [row["accuracy"] for row in rows if row["accuracy"] is not None]
    lowest = np.floor(20 * min(values)) / 20
    layers = sorted({row["layer"] for row in rows})
    widths = [max(r["expert"] for r in rows if r["kind"] == kind) + 1 for kind in kinds]
    room = [max(1.7, width) for width in widths]
    height = max(1.9, 0.32 * len(layers) + 0.9)
    figure = new_figure(1.6 + 0.62 * sum(room) + 0.5 * len(kinds), height * len(policies))
    grid = figure.subplots(
        len(policies), len(kinds), squeeze=False, gridspec_kw={"width_ratios": room}
    )
    image = None
    for policy, line in zip(policies, grid, strict=True):
        for kind, width, axes in zip(kinds, widths, line, strict=True):
            table = np.full((len(layers), width), np.nan)
            for row in rows:
                if (row["policy"], row["kind"]) == (policy, kind):
                    accuracy = row["accuracy"]
                    table[layers.index(row["layer"]), row["expert"]] = (
                        np.nan if accuracy is None else accuracy
                    )
            image = axes.imshow(
                table, cmap=colour_map("cividis"), vmin=lowest, vmax=1.0, aspect="auto"
            )
            _write_values(axes, table, lowest)
            axes.grid(False)
            axes.set_xticks(range(width) if kind != "depth" else [])
            axes.set_yticks(range(len(layers)), layers)
            axes.set_xlabel("expert" if kind != "depth" else "whole layer")
            axes.set_ylabel("layer")
            short = {"causal": "causal", "calibrated": "calibrated"}[policy]
            axes.set_title(f"{kind}, {short}")
    bar = figure.colorbar(image, ax=grid, fraction=0.04, pad=0.02)
    bar.set_label("accuracy against expert choice")
    return figure


def _write_values(axes: Any, table: Any, lowest: float) -> None:
    if table.size > 300:
        return
    for (layer, expert), value in np.ndenumerate(table):
        if np.isfinite(value):
            is_dark = value < (1 + lowest) / 2
            colour = "white" if is_dark else "black"
            text = f"{value:.3f}".removeprefix("0")
            axes.text(expert, layer, text, ha="center", va="center", color=colour, fontsize=7)


def draw_calibration(parts: Mapping[str, Any]) -> Any:
    """How often a pair is selected that the auxiliary router gives a probability."""
    if "policies" not in parts:
        return None
    splits = {n: s["calibration"] for n, s in parts["policies"]["splits"].items()}
    splits = {name: found for name, found in splits.items() if found}
    if not splits:
        return None
    kinds = kinds_in(list(next(iter(splits.values()))))
    figure = new_figure(3.7 * len(kinds) + 0.4, 4.2)
    grid = figure.subplots(
        2, len(kinds), squeeze=False, sharex=True, gridspec_kw={"height_ratios": [3.2, 1]}
    )
    for kind, axes, below in zip(kinds, grid[0], grid[1], strict=True):
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1, label="perfect")
        for split, found in splits.items():
            if kind not in found:
                continue
            bins = found[kind]
            points = [
                (p, f)
                for p, f in zip(bins["probability"], bins["frequency"], strict=True)
                if p is not None
            ]
            colour = _SPLIT_COLOURS[split]
            axes.plot(
                *zip(*points, strict=True),
                "o-" if split == "train" else "s--",
                color=colour,
                label=f"{SPLITS[split]}: ECE {bins['expected_error']:.3f}, "
                f"AUROC {value_of({'value': bins['auroc']}):.4f}",
            )
            counts = np.array(bins["counts"])
            edges = np.linspace(0, 1, len(counts) + 1)
            below.stairs(counts / max(1, counts.sum()), edges, color=colour, linewidth=1.3)
        axes.set_title(f"{kind} routers")
        axes.set_ylabel("share selected by expert choice")
        axes.legend(loc="upper left")
        axes.set_ylim(0, 1.28)
        axes.set_yticks(np.linspace(0, 1, 6))
        below.set_yscale("log")
        below.set_ylabel("share of pairs")
        below.set_xlabel("auxiliary router's probability")
        below.set_xlim(0, 1)
    return figure


def draw_use(parts: Mapping[str, Any]) -> Any:
    """Histogram of experts per token under each policy that tells tokens apart."""
    if "policies" not in parts:
        return None
    use = parts["policies"]["splits"]["train"]["use"]
    names = [n for n in ("expert_choice", "causal", "calibrated", "random") if n in use]
    kinds = [kind for kind in use["expert_choice"] if kind != "depth"]
    if not kinds:
        return None
    figure = new_figure(4.2 * len(kinds), 3.2)
    for kind, axes in zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0], strict=True):
        for number, name in enumerate(names):
            found = use[name].get(kind)
            if found is None:
                continue
            shares = np.array(found["histogram"])
            places = np.arange(len(shares)) + (number - (len(names) - 1) / 2) * 0.8 / len(names)
            load = found["load_variation"]
            uneven = "" if load is None else f", load CV {load['mean']:.2f}"
            axes.bar(
                places,
                100 * shares,
                width=0.8 / len(names),
                color=POLICY_COLOURS[name] if name != "random" else GREY,
                hatch="//" if name == "calibrated" else None,
                edgecolor="white",
                linewidth=0,
                label=f"{name.replace('_', ' ')}: mean {found['experts_per_token']:.2f}{uneven}",
            )
        axes.set_xticks(range(len(shares)))
        axes.set_xlabel("experts that take a token in a layer")
        axes.set_ylabel("tokens and layers (%)")
        axes.set_title(f"{kind} tokens, training data")
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
        axes.legend(loc="upper right")
    return figure
