"""Medians, ranges and ratios of architectures that took turns, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from momaserve_bench.architectures_findings import Finding, add_ratios, rows_of


def finding(name: str, *rates: float, group: int = 0, **other: Any) -> Finding:
    values: dict[str, Any] = {"kind": "decode", "rows": "text", "batch_size": 4, **other}
    seconds = tuple(1.0 / rate for rate in rates)
    return Finding(group=group, architecture=name, rates=rates, first_token_s=seconds, **values)


def test_ratios_are_of_the_same_round() -> None:
    """The machine grew three times as slow, for both alike."""
    dense, sparse = rows_of([finding("dense", 30, 20, 10), finding("4t4i", 15, 12, 4)])
    assert (sparse["tokens_per_s"], sparse["tokens_per_s_range"]) == (12, [4, 15])
    assert sparse["ratio_to_dense"] == 0.5
    assert sparse["ratio_to_dense_range"] == [0.4, 0.6]
    assert (dense["ratio_to_dense"], dense["ratio_to_dense_range"]) == (1, [1, 1])
    assert sparse["median_ttft_ms"] == pytest.approx(1e3 / 12)
    assert sparse["roof"] is None


def test_ratios_are_of_the_same_group_and_dense_has_the_rounds_of_all() -> None:
    found = rows_of(
        [
            finding("dense", 30.0, 30.0, group=0),
            finding("moe_8x", 15.0, 15.0, group=0),
            finding("dense", 10.0, 20.0, group=1),
            finding("4t4i", 10.0, 20.0, group=1),
        ]
    )
    by_name = {row["architecture"]: row for row in found}
    assert [row["architecture"] for row in found] == ["dense", "moe_8x", "4t4i"]
    assert by_name["moe_8x"]["ratio_to_dense"] == 0.5
    assert by_name["4t4i"]["ratio_to_dense"] == 1.0
    assert by_name["dense"]["tokens_per_s_rounds"] == [30, 30, 10, 20]
    assert by_name["dense"]["tokens_per_s"] == 25


def test_columns_do_not_mix() -> None:
    found = rows_of(
        [
            finding("dense", 10.0),
            finding("4t4i", 5.0),
            finding("dense", 100.0, rows="image"),
            finding("4t4i", 20.0, rows="image"),
            finding("dense", 1000.0, kind="prefill", batch_size=1),
            finding("4t4i", 100.0, kind="prefill", batch_size=1),
        ]
    )
    ratios = [row["ratio_to_dense"] for row in found if row["architecture"] == "4t4i"]
    assert ratios == [0.5, 0.2, 0.1]
    assert [row["kind"] for row in found] == ["decode"] * 4 + ["prefill"] * 2


def test_nothing_is_compared_with_a_dense_that_is_not_there() -> None:
    touched = {"bytes_per_step": 50.0, "parts": {}, "distinct_experts": {}}
    [row] = rows_of([finding("4t4i", 5.0, touched=touched, read_bandwidth=100.0)])
    assert row["ratio_to_dense"] is row["ratio_to_dense_range"] is None
    assert row["roof"]["bytes_ratio_to_dense"] is None
    assert row["roof"]["share"] is not None


def test_the_roof_is_the_batch_over_the_time_to_read_a_step() -> None:
    def touched(count: float) -> dict[str, Any]:
        return {"bytes_per_step": count, "parts": {"experts": count}, "distinct_experts": {"a": 1}}

    dense, sparse = rows_of(
        [
            finding("dense", 20.0, 10.0, 20.0, touched=touched(50.0), read_bandwidth=1000.0),
            finding("4t4i", 20.0, 10.0, 5.0, touched=touched(200.0), read_bandwidth=1000.0),
        ]
    )
    assert dense["roof"]["tokens_per_s"] == 4 * 1000 / 50
    assert dense["roof"]["share"] == 0.25
    assert (sparse["roof"]["tokens_per_s"], sparse["roof"]["share"]) == (20, 0.5)
    assert sparse["roof"]["bytes_ratio_to_dense"] == 4
    assert sparse["roof"]["parts"] == {"experts": 200}


def test_numbers_that_nobody_tells_have_no_ratio() -> None:
    one = {"architecture": "dense", "weight_bytes": 10, "resident_bytes": None}
    two = {"architecture": "4t4i", "weight_bytes": 40, "resident_bytes": 50}
    add_ratios([one, two], ("weight_bytes", "resident_bytes"))
    assert two["ratios_to_dense"] == {"weight_bytes": 4.0, "resident_bytes": None}
    alone: dict[str, Any] = dict(two)
    add_ratios([alone], ("weight_bytes",))
    assert alone["ratios_to_dense"] == {"weight_bytes": None}
