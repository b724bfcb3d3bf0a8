"""What `bench architectures` shows: tables, and the results part of a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from momaserve_bench.architectures_options import DENSE
from momaserve_bench.report import print_table
from momaserve_bench.results_page import table_line

Row = Mapping[str, Any]
Cell = Callable[[Row], object]

_SIZES: tuple[tuple[str, Cell], ...] = (
    ("architecture", lambda one: one["architecture"]),
    ("parameters", lambda one: f"{one['num_parameters']:,}"),
    ("MFLOPs per word", lambda one: _millions(one["text_flops_per_token"])),
    ("FLOPs over dense", lambda one: _ratio(one["ratios_to_dense"]["text_flops_per_token"])),
    ("weights MB", lambda one: _millions(one["weight_bytes"])),
    ("weights over dense", lambda one: _ratio(one["ratios_to_dense"]["weight_bytes"])),
    ("resident MB", lambda one: _millions(one["resident_bytes"])),
    ("resident over dense", lambda one: _ratio(one["ratios_to_dense"]["resident_bytes"])),
)
_RATES: tuple[tuple[str, Cell], ...] = (
    ("architecture", lambda row: row["architecture"]),
    ("tokens/s", lambda row: _number(row["tokens_per_s"])),
    ("range", lambda row: "–".join(map(_number, row["tokens_per_s_range"]))),
    ("over dense", lambda row: _ratio(row["ratio_to_dense"])),
    ("range over dense", lambda row: _ratios(row["ratio_to_dense_range"])),
)
_DECODE: tuple[tuple[str, Cell], ...] = (
    ("rows decode", lambda row: row["rows"]),
    ("batch", lambda row: row["batch_size"]),
    *_RATES,
    ("MB per step", lambda row: _millions(row["roof"]["bytes_per_step"])),
    ("bytes over dense", lambda row: _ratio(row["roof"]["bytes_ratio_to_dense"])),
    ("experts", lambda row: _experts(row["roof"]["distinct_experts"])),
    ("of the roof", lambda row: f"{row['roof']['share']:.0%}"),
)


def _millions(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f}"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratios(values: Sequence[float] | None) -> str:
    return "-" if values is None else "–".join(map(_ratio, values))


def _experts(distinct: Mapping[str, float]) -> str:
    return " ".join(f"{group} {mean:.2f}" for group, mean in distinct.items()) or "-"


def _of(report: Row, kind: str) -> list[Row]:
    return [row for row in report["results"] if row["kind"] == kind]


def _table(columns: Sequence[tuple[str, Cell]], rows: Sequence[Row]) -> list[list[object]]:
    return [[cell(row) for _, cell in columns] for row in rows]


def _parts(report: Row) -> list[tuple[str, Sequence[tuple[str, Cell]], list[Row]]]:
    """(title, columns, rows) of every table that has rows."""
    settings = report["settings"]
    parts: list[tuple[str, Sequence[tuple[str, Cell]], list[Row]]] = [
        ("Size and memory", _SIZES, list(report["architectures"])),
        (f"Prefill of {settings['prefill_len']} words", _RATES, _of(report, "prefill")),
        (f"Decoding after {settings['input_len']} words", _DECODE, _of(report, "decode")),
    ]
    return [part for part in parts if part[2]]


def print_report(report: Row) -> None:
    for title, columns, rows in _parts(report):
        print_table(title, [name for name, _ in columns], _table(columns, rows))
    for name, reason in report["missing"].items():
        print(f"  not measured: {name}: {reason}")


def sentences(report: Row) -> list[str]:
    """What the tables come to, one sentence for each architecture that is not dense."""
    found = []
    for one in report["architectures"]:
        name, ratios = one["architecture"], one["ratios_to_dense"]
        if name == DENSE:
            continue
        facts = []
        decode = [
            row["ratio_to_dense"]
            for row in _of(report, "decode")
            if row["architecture"] == name and row["ratio_to_dense"] is not None
        ]
        if decode:
            facts.append(f"decodes at {_ratio(min(decode))} to {_ratio(max(decode))} times")
        facts += [
            f"computes prompts at {_ratio(row['ratio_to_dense'])} times"
            for row in _of(report, "prefill")
            if row["architecture"] == name and row["ratio_to_dense"] is not None
        ]
        speed = f"{' and '.join(facts)} the tokens/s of dense; " if facts else ""
        memory = [f"its weights take {_ratio(ratios['weight_bytes'])} times"]
        if ratios["resident_bytes"] is not None:
            memory.append(f"its process {_ratio(ratios['resident_bytes'])} times")
        if ratios["weight_bytes"] is not None:
            found.append(f"`{name}` {speed}{' and '.join(memory)} the memory.")
    return found


def markdown(report: Row, picture: str) -> str:
    """The results as a section; `picture` is a file beside the page."""
    settings, host = report["settings"], report["machine"]
    lines = [
        "## Results",
        "",
        *(f"* {sentence}" for sentence in sentences(report)),
        "",
        f"`moma-{settings['size']}-*`, {settings['dtype']}, {settings['threads']} thread(s), "
        f"medians and ranges over {settings['rounds']} round(s), temperature "
        f"{settings['temperature']:g}; {host['cpu']}, torch {host['torch']}, commit "
        f"`{str(host['commit'])[:12]}`. Ratios are "
        "medians over rounds of a round's rate over dense's in the same round.",
        "",
    ]
    for title, columns, rows in _parts(report):
        lines += [f"### {title}", "", table_line([name for name, _ in columns])]
        lines.append(table_line(["---"] * len(columns)))
        lines += [table_line(cells) for cells in _table(columns, rows)]
        lines.append("")
    lines += [f"Not measured: {name}: {why}\n" for name, why in report["missing"].items()]
    lines += [f"![Tokens per second and memory by architecture]({picture})", ""]
    return "\n".join(lines)
