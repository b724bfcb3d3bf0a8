"""What `bench serve` shows: tables, a file of every request, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from momaserve.errors import ConfigError
from momaserve.training.plot import new_figure, save_figure
from momaserve_bench.records import Outcome, RequestRecord
from momaserve_bench.report import print_table
from momaserve_bench.serve_metrics import measurements
from momaserve_bench.serve_options import METRICS

DRAWN = ("ttft", "itl", "e2el", "image_latency")


def show(results: Sequence[Mapping[str, Any]], percents: Sequence[float]) -> None:
    """Tables for people."""
    print_table(
        "requests",
        ("rate", "done", "failed", "cancelled", "s", "req/s", "good/s", "tok/s", "images/s"),
        [
            (
                r["request_rate"],
                r["completed"],
                r["failed"],
                r["cancelled"],
                r["duration"],
                r["request_throughput"],
                _cell(r["request_goodput"]),
                r["output_throughput"],
                r["images_per_s"],
            )
            for r in results
        ],
    )
    stats = ("mean", "median", "std", *(f"p{percent:g}" for percent in percents))
    print_table(
        "milliseconds; from when a request was sent, or from when it was due (scheduled)",
        ("rate", "", *stats),
        [
            (r["request_rate"], name, *(_cell(r.get(f"{stat}_{name}_ms")) for stat in stats))
            for r in results
            for name in METRICS
            if r[f"mean_{name}_ms"] is not None
        ],
    )
    for r in results:
        for failure in r["failures"]:
            print(f"  {failure['count']} failed with {failure['reason']}: {failure['example']}")


def show_cost(costs: Mapping[str, Mapping[str, Any]]) -> None:
    """What HTTP costs, for people."""
    print_table(
        "the same requests without a server",
        ("", "requests", "at a time", "HTTP s", "offline s", "HTTP costs"),
        [
            (
                part.replace("_", " "),
                cost["num_requests"],
                cost["concurrency"],
                cost["http_s"],
                cost["offline_s"],
                f"{cost['cost_percent']:+.1f}%",
            )
            for part, cost in costs.items()
        ],
    )


def _cell(value: float | None) -> object:
    return "-" if value is None else value


def save(path: Path, report: Mapping[str, Any], runs: Sequence[Sequence[RequestRecord]]) -> None:
    """Writes the report with a list of all requests in each result.

    Raises:
        ConfigError: the file cannot be written.
    """
    results = [
        {**result, "requests": [asdict(record) for record in records]}
        for result, records in zip(report["results"], runs, strict=True)
    ]
    try:
        path.write_text(json.dumps({**report, "results": results}) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--save-result {path} cannot be written: {error}") from None


def draw(
    results: Sequence[Mapping[str, Any]], runs: Sequence[Sequence[RequestRecord]], path: Path
) -> None:
    """What share of requests took at most how long, and throughput if there are several rates.

    Raises:
        ConfigError: the file cannot be written, or there is no matplotlib.
    """
    measured = [
        measurements([record for record in records if record.outcome is Outcome.COMPLETED])
        for records in runs
    ]
    names = [name for name in DRAWN if any(values[name] for values in measured)]
    has_rates = len(results) > 1
    if not names:
        raise ConfigError(f"--plot {path}: no request was completed, so there is nothing to draw")
    figure = new_figure(len(names) + has_rates)
    panels = np.atleast_1d(figure.subplots(1, len(names) + has_rates))
    for axes, name in zip(panels, names, strict=False):
        for result, values in zip(results, measured, strict=True):
            if values[name]:
                ms = np.sort(values[name]) * 1e3
                shares = np.arange(1, len(ms) + 1) / len(ms)
                axes.step(ms, shares, where="post", label=f"{result['request_rate']} per s")
        axes.set_xlabel(f"{name} in ms")
        axes.set_ylabel("share of measurements")
        axes.set_ylim(0, 1)
        axes.legend()
    if has_rates:
        by_rate = sorted(results, key=lambda r: float(r["request_rate"]))
        places = range(len(by_rate))
        for key, label in (("request_throughput", "completed"), ("request_goodput", "good")):
            if results[0][key] is not None:
                panels[-1].plot(places, [r[key] for r in by_rate], "o-", label=label)
        panels[-1].set_xticks(places, [str(r["request_rate"]) for r in by_rate])
        panels[-1].set_xlabel("requests per second that were due")
        panels[-1].set_ylabel("requests per second")
        panels[-1].set_ylim(bottom=0)
        panels[-1].legend()
    try:
        save_figure(figure, path)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error}") from None
