"""Bars of `bench architectures`: decoding by batch size and modality, prefill, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from momaserve.training.plot import new_figure, save_figure
from momaserve_bench.architectures_options import PRESETS

_LOOKS = dict(
    zip(
        PRESETS,
        (("#0072B2", ""), ("#E69F00", "//"), ("#009E73", ".."), ("#CC79A7", "xx")),
        strict=True,
    )
)
"""Colours of Okabe and Ito, which colour-blind people tell apart, and hatches for grey paper."""
_PANELS = {"text": "words", "image": "codes of pictures", "mixed": "half words, half codes"}
_COLUMNS = 3

Bar = tuple[float, float, float]
"""Height, and the ends of its range."""


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    names = [one["architecture"] for one in report["architectures"]]
    panels = _decode_panels(report["results"])
    prefill = {
        row["architecture"]: {"": _bar(row)}
        for row in report["results"]
        if row["kind"] == "prefill"
    }
    if prefill:
        panels.append(("prefill", "prompt", "tokens/s", prefill))
    panels.append(("memory", "", "GB", _memory(report["architectures"])))
    figure = new_figure(_COLUMNS)
    count = len(panels) + 1  # the last one is for the legend
    rows = -(-count // _COLUMNS)
    figure.set_size_inches(6.4 * _COLUMNS, 4.8 * rows)
    places = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes, (title, across, unit, bars) in zip(places, panels, strict=False):
        _draw_panel(axes, names, bars)
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.set_ylabel(unit)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    handles, labels = places[0].get_legend_handles_labels()
    settings = report["settings"]
    title = f"moma-{settings['size']}-*, {settings['dtype']}\nbars: medians, lines: ranges"
    places[len(panels)].legend(handles, labels, loc="center", title=title, fontsize="large")
    save_figure(figure, path)


def _decode_panels(
    results: Sequence[Mapping[str, Any]],
) -> list[tuple[str, str, str, dict[str, dict[str, Bar]]]]:
    panels = []
    for rows, words in _PANELS.items():
        bars: dict[str, dict[str, Bar]] = {}
        for row in results:
            if row["kind"] == "decode" and row["rows"] == rows:
                bars.setdefault(row["architecture"], {})[str(row["batch_size"])] = _bar(row)
        if bars:
            panels.append((f"decode: {words}", "rows of the batch", "tokens/s", bars))
    return panels


def _bar(row: Mapping[str, Any]) -> Bar:
    lowest, highest = row["tokens_per_s_range"]
    return row["tokens_per_s"], lowest, highest


def _memory(architectures: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Bar]]:
    """In GB; nothing of what nobody tells."""
    kinds = {"weights": "weight_bytes", "resident": "resident_bytes"}
    return {
        one["architecture"]: {
            label: (one[key] / 1e9,) * 3 for label, key in kinds.items() if one[key] is not None
        }
        for one in architectures
    }


def _draw_panel(axes: Any, names: Sequence[str], bars: Mapping[str, Mapping[str, Bar]]) -> None:
    labels = list(dict.fromkeys(label for one in bars.values() for label in one))
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        mine = bars.get(name, {})
        places = [labels.index(label) + (index - (len(names) - 1) / 2) * width for label in mine]
        heights = [height for height, _, _ in mine.values()]
        below = [height - lowest for height, lowest, _ in mine.values()]
        above = [highest - height for height, _, highest in mine.values()]
        colour, hatch = _LOOKS[name]
        axes.bar(
            places,
            heights,
            width,
            yerr=[below, above] if any(below + above) else None,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            ecolor="black",
            capsize=2,
            label=name,
        )
    axes.set_xticks(range(len(labels)), labels)
