"""What `bench learning` shows: a table, a picture, and the results part of a page."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from momaserve.training.plot import new_figure, save_figure
from momaserve_bench.learning_curves import MODALITIES, mean
from momaserve_bench.report import print_table
from momaserve_bench.results_page import ResultsPage, table_line

PAPER = {
    "dense": {"text": 1.0, "image": 1.0, "all": 1.0},
    "moe_8x": {"text": 3.0, "image": 2.8, "all": 3.0},
    "4t4i": {"text": 2.6, "image": 5.2, "all": 3.7},
}
"""eta at 1.4 billion active parameters and 10^12 tokens (MoMa, 2407.21770, section 4)."""
HEADER = (
    "architecture",
    "parameters",
    "FLOPs / dense",
    *(f"{what} {name}" for what in ("loss", "validation", "eta") for name in MODALITIES),
)


def rows_of(report: Mapping[str, Any]) -> list[list[object]]:
    """A row per architecture under HEADER; means over seeds."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in report["runs"]:
        by_name.setdefault(run["architecture"], []).append(run)
    dense = mean([run["flops"] for run in by_name.get("dense", [])])
    rows: list[list[object]] = []
    for name, runs in by_name.items():
        flops = mean([run["flops"] for run in runs])
        row: list[object] = [name, f"{runs[0]['parameters']:,}"]
        row.append("-" if dense is None or flops is None else f"{flops / dense:.4f}")
        for key in ("loss", "validation_loss"):
            row += [_number(mean([run[key].get(m) for run in runs]), 3) for m in MODALITIES]
        etas = report["speed_up"].get(name, {})
        row += [_eta(etas.get(m)) for m in MODALITIES]
        rows.append(row)
    return rows


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _eta(values: Mapping[str, Any] | None) -> str:
    """The mean, and in brackets the seeds; "not reached" where a seed stays above dense."""
    if values is None:
        return "-"
    seeds: Sequence[float | None] = values["per_seed"]
    if all(value is None for value in seeds):
        return "not reached"
    shown = ", ".join("not reached" if value is None else f"{value:.2f}" for value in seeds)
    head = _number(values["mean"], 2)
    return head if len(seeds) == 1 else f"{head} ({shown})"


def print_report(report: Mapping[str, Any]) -> None:
    settings = report["settings"]
    seeds = ", ".join(map(str, settings["seeds"]))
    title = f"{settings['steps']} steps, seeds {seeds}; losses in nat per token"
    print_table(title, HEADER, rows_of(report))


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss against FLOPs by modality: training smoothed, validation dashed."""
    figure = new_figure(len(MODALITIES))
    names = list(dict.fromkeys(run["architecture"] for run in runs))
    for axes, modality in zip(figure.subplots(1, len(MODALITIES)), MODALITIES, strict=True):
        for run in runs:
            colour = f"C{names.index(run['architecture'])}"
            is_first = run["seed"] == runs[0]["seed"]
            for kind, style in (("train_smoothed", "-"), ("validation", "--")):
                points = run["curves"][kind][modality]
                if points:
                    is_named = is_first and kind != "validation"
                    label = {"label": run["architecture"]} if is_named else {}
                    axes.plot(*zip(*points, strict=True), style, color=colour, lw=1, **label)
        axes.set_title(modality)
        axes.set_xlabel("training FLOPs")
        axes.set_ylabel("loss in nat per token (dashed: validation)")
        if axes.lines:
            axes.legend()
    save_figure(figure, path)


def write_page(page: Path, report: Mapping[str, Any], picture: Path) -> None:
    """Replace what stands between the two marks of a page, and put the picture beside it.

    Raises:
        DataError: the page cannot be read, or lacks the marks.
    """
    results = ResultsPage.open(page)
    copy = page.with_name("learning.png")
    shutil.copyfile(picture, copy)
    results.write(markdown(report, copy.name))


def markdown(report: Mapping[str, Any], picture: str) -> str:
    """The results as a section."""
    settings, host = report["settings"], report["machine"]
    first = report["runs"][0]
    seeds = ", ".join(map(str, settings["seeds"]))
    lines = [
        "## Results",
        "",
        f"Recipe `{settings['recipe']}`, {settings['steps']:,} steps ({first['flops']:.3g} FLOPs "
        f"for {first['architecture']}), seeds {seeds}; {host['cpu']}, {host['threads']} thread(s), "
        f"torch {host['torch']}, commit `{str(host['commit'])[:12]}`. Losses in nat per token are "
        "means over seeds of the last twentieth of training; η is the mean, in brackets each seed.",
        "",
        table_line(HEADER),
        table_line(["---"] * len(HEADER)),
        *(table_line(row) for row in rows_of(report)),
        "",
        "η beside the paper's (1.4 billion active parameters, 10¹² tokens):",
        "",
        table_line(
            [
                "architecture",
                *(f"here {m}" for m in MODALITIES),
                *(f"paper {m}" for m in MODALITIES),
            ]
        ),
        table_line(["---"] * (1 + 2 * len(MODALITIES))),
    ]
    for name, etas in report["speed_up"].items():
        paper = PAPER.get(name, {})
        here = [_eta(etas.get(m)) for m in MODALITIES]
        lines.append(table_line([name, *here, *(_number(paper.get(m), 1) for m in MODALITIES)]))
    lines += ["", f"![Loss against training FLOPs]({picture})", ""]
    return "\n".join(lines)
