"""report.html: one file with everything in it, readable by day and by night."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from momaserve.router_lab.tables import Table, compared, tables
from momaserve.training.run import write_atomically

_STYLE = """\
:root { color-scheme: light dark; --line: #c8ccd0; --soft: #57606a; --card: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444c56; --soft: #9aa4ae; --card: #21262d; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
.about, figcaption, .detail { color: var(--soft); font-size: .88rem; }
.finding { background: var(--card); border-radius: .4rem; padding: .6rem .9rem; margin: .5rem 0; }
.finding p { margin: .1rem 0; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line); border-radius: .4rem; padding: .4rem; box-sizing: border-box; }
.table { overflow-x: auto; margin: .8rem 0 1.4rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left;
  white-space: nowrap; }
summary { cursor: pointer; margin: .4rem 0; }
"""
_FIGURES = {
    "losses": (
        "policies",
        "Loss by routing policy, above the training condition on the same documents.",
    ),
    "accuracy": ("policies", "Share of decisions that agree with expert choice, by expert."),
    "calibration": (
        "policies",
        "Whether the auxiliary routers' probabilities come true, all layers and experts together.",
    ),
    "use": ("policies", "How many experts tokens get in a layer."),
    "routing": (
        "policies",
        "Which experts take which places of a picture under expert choice, and where causal "
        "routing decides otherwise. Each place has a tile for every expert.",
    ),
    "noise": (
        "noise",
        "Loss against the share of decisions that are turned around. Equal shares are equally "
        "many wrong decisions, whatever the kind of flip.",
    ),
    "thresholds": ("thresholds", "Loss against compute as cuts or capacities move."),
    "shift": (
        "shift",
        "Agreement with expert choice, loss, and what serving adds to the loss, as data drifts. "
        "Bands are 95 % intervals over documents, those of calibrated thresholds left out.",
    ),
}
_TITLES = {
    "policies": "Routers and losses by policy",
    "noise": "Noise: what wrong decisions cost",
    "thresholds": "Thresholds and capacity",
    "shift": "Distribution shift",
    "generation": "Generation",
    "better-routers": "Better routers",
}


def write_page(report: Mapping[str, Any], figures: Mapping[str, Path], path: Path) -> None:
    """Write the page of a report, with the figures that there are."""
    write_atomically(path, "\n".join(_page(report, figures)) + "\n")


def _page(report: Mapping[str, Any], figures: Mapping[str, Path]) -> Iterator[str]:
    checkpoint, parts = report["checkpoint"], report["parts"]
    title = f"Router report: {checkpoint['name']}"
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{escape(title)}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>"
    yield f"<h1>{escape(title)}</h1>"
    yield f'<p class="about">{escape(_about(report))}</p>'
    for finding in report["findings"]:
        yield f'<div class="finding"><p><strong>{escape(finding["question"])}</strong> '
        yield f"{escape(finding['answer'])}</p>"
        yield f'<p class="detail">{escape(finding["detail"])}</p></div>'
    by_part = tables(parts)
    for name, part in parts.items():
        yield f"<h2>{_TITLES[name]}</h2>"
        if isinstance(part.get("skipped"), str):
            yield f"<p>Left out: {escape(part['skipped'])}.</p>"
        for figure, (owner, caption) in _FIGURES.items():
            if owner == name and figure in figures:
                yield _figure(figures[figure], caption)
        for table in by_part[name]:
            yield from _table(table)
    served = compared(parts)
    if served:
        yield "<h2>Calibrated thresholds or auxiliary routers</h2>"
        for table in served:
            yield from _table(table)
    yield "</body>\n</html>"


def _about(report: Mapping[str, Any]) -> str:
    checkpoint, settings, host = report["checkpoint"], report["settings"], report["machine"]
    groups = ", ".join(f"{count} {name}" for name, count in checkpoint["groups"].items())
    depth = checkpoint["depth_routing"]
    layers = f"{checkpoint['layers']} layers"
    if depth is not None:
        layers += f", {len(depth['layers'])} of them routed by depth"
    return (
        f"{layers}, hidden size {checkpoint['hidden_size']}, experts: {groups}. "
        f"Data: {report['data']['source']}; {settings['batches']} batches of each split, seed "
        f"{settings['seed']}, {settings['bootstrap']} resamples of documents; intervals are 95 %. "
        f"momaserve {host['momaserve']}, torch {host['torch']}, {host['cpu']}, "
        f"{host['threads']} thread(s)."
    )


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _table(table: Table) -> Iterator[str]:
    if table.is_long:
        yield f"<details><summary>{escape(table.title)}</summary>"
    yield '<div class="table"><table>'
    if not table.is_long:
        yield f"<caption>{escape(table.title)}</caption>"
    yield f"<thead>{_row(table.header, 'th')}</thead><tbody>"
    for row in table.rows:
        yield _row(row, "td")
    yield "</tbody></table></div>"
    if table.is_long:
        yield "</details>"


def _row(cells: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
