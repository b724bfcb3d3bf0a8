"""What was found of architectures that took turns: medians, ranges, and ratios against dense.

Pure arithmetic on what runs gave; knows no process.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from momaserve_bench.architectures_options import DENSE
from momaserve_bench.peers.rates import summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One architecture's rounds at one kind of work."""

    group: int
    """Those of one group took turns with one another."""
    architecture: str
    kind: str
    """`decode` or `prefill`."""
    rows: str
    """`text`, `image` or `mixed`."""
    batch_size: int
    rates: tuple[float, ...]
    """Tokens/s, round by round."""
    first_token_s: tuple[float, ...]
    touched: dict[str, Any] | None = None
    """While decoding: `bytes_per_step`, its `parts` and `distinct_experts`."""
    read_bandwidth: float | None = None
    """While decoding: bytes/s at which this machine read memory just before."""

    @property
    def column(self) -> tuple[str, str, int]:
        return self.kind, self.rows, self.batch_size

    @property
    def roof_rate(self) -> float | None:
        """Tokens/s if nothing but reading took time."""
        if self.touched is None or self.read_bandwidth is None:
            return None
        return self.batch_size * self.read_bandwidth / float(self.touched["bytes_per_step"])


def rows_of(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """One entry for each architecture in each column, in the order in which they came.

    An architecture that ran in several groups has the rounds of all. `ratio_to_dense` is the median
    over rounds of its rate over that of dense in the same round, None without dense.
    """
    columns = list(dict.fromkeys(finding.column for finding in findings))
    names = list(dict.fromkeys(finding.architecture for finding in findings))
    rows: list[dict[str, Any]] = []
    for column in columns:
        here = [finding for finding in findings if finding.column == column]
        dense = {finding.group: finding for finding in here if finding.architecture == DENSE}
        for name in names:
            mine = [finding for finding in here if finding.architecture == name]
            if mine:
                rows.append(_row(mine, dense))
    return rows


def _row(mine: Sequence[Finding], dense: dict[int, Finding]) -> dict[str, Any]:
    first = mine[0]
    rounds = [rate for finding in mine for rate in finding.rates]
    rate = summary(rounds)
    ratios = [
        one / other
        for finding in mine
        if finding.group in dense
        for one, other in zip(finding.rates, dense[finding.group].rates, strict=True)
    ]
    row: dict[str, Any] = {
        "architecture": first.architecture,
        "kind": first.kind,
        "rows": first.rows,
        "batch_size": first.batch_size,
        "tokens_per_s": rate.median,
        "tokens_per_s_range": [rate.lowest, rate.highest],
        "tokens_per_s_rounds": rounds,
        "median_ttft_ms": 1e3 * statistics.median(s for f in mine for s in f.first_token_s),
        "ratio_to_dense": statistics.median(ratios) if ratios else None,
        "ratio_to_dense_range": [min(ratios), max(ratios)] if ratios else None,
        "roof": None,
    }
    if first.touched is not None:
        shares = [
            rate / finding.roof_rate
            for finding in mine
            if finding.roof_rate is not None
            for rate in finding.rates
        ]
        theirs = dense[first.group].touched if first.group in dense else None
        touched = first.touched["bytes_per_step"]
        row["roof"] = {
            **first.touched,
            "bytes_ratio_to_dense": touched / theirs["bytes_per_step"] if theirs else None,
            "read_bandwidth_bytes_per_s": first.read_bandwidth,
            "tokens_per_s": first.roof_rate,
            "share": statistics.median(shares) if shares else None,
        }
    return row


def add_ratios(architectures: Sequence[dict[str, Any]], keys: Sequence[str]) -> None:
    """Gives each a `ratios_to_dense` of these numbers; None where either is not known."""
    dense = next((one for one in architectures if one["architecture"] == DENSE), None)
    for one in architectures:
        one["ratios_to_dense"] = {
            key: one[key] / dense[key] if dense and one[key] and dense[key] else None
            for key in keys
        }
