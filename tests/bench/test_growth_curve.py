"""Exponents by hand, and what is marked; default lengths; readings of resident memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from momaserve_bench.growth_curve import Curve, doublings, local_exponents, passes
from momaserve_bench.growth_plot import round_numbers
from momaserve_bench.resident import NOW, PEAK, resident_bytes


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_a_power_law_has_its_power_everywhere(power: float) -> None:
    points = [(x, 3 * x**power) for x in (1.0, 2.0, 8.0, 100.0)]
    first, *others = local_exponents(points)
    assert first is None
    assert others == pytest.approx([power] * 3)


def test_exponents_by_hand() -> None:
    # Twice the x: the same y, twice, eight times as much, half.
    points = [(1.0, 5.0), (2.0, 5.0), (4.0, 10.0), (8.0, 80.0), (16.0, 40.0)]
    found = local_exponents(points)
    assert found[0] is None
    assert found[1:] == pytest.approx([0.0, 1.0, 3.0, -1.0])


@pytest.mark.parametrize(
    "points",
    [
        [(0.0, 1.0), (2.0, 3.0)],
        [(1.0, 0.0), (2.0, 3.0)],
        [(1.0, 2.0), (2.0, -3.0)],
        [(2.0, 2.0), (2.0, 3.0)],
    ],
)
def test_what_has_no_exponent(points: list[tuple[float, float]]) -> None:
    assert local_exponents(points) == [None, None]
    assert local_exponents([]) == []
    assert local_exponents(points[:1]) == [None]


@pytest.mark.parametrize(
    ("exponent", "lowest", "highest", "expected"),
    [
        (1.14, None, 1.0, False),
        (1.16, None, 1.0, True),
        (2.14, None, 2.0, False),
        (2.16, None, 2.0, True),
        (-0.14, 0.0, None, False),
        (-0.16, 0.0, None, True),
        (9.0, 0.0, None, False),
        (-9.0, None, 1.0, False),
        (None, 0.0, 1.0, False),
    ],
)
def test_limits(
    exponent: float | None, lowest: float | None, highest: float | None, expected: bool
) -> None:
    assert passes(exponent, lowest, highest) is expected


def test_throughput_that_falls_is_marked() -> None:
    none: dict[str, int] = {}
    measured = [(1.0, 100.0, none), (2.0, 95.0, none), (4.0, 80.0, none), (8.0, 160.0, none)]
    curve = Curve.through("throughput", "concurrency", "output_throughput", measured, lowest=0.0)
    assert [point.is_super_linear for point in curve.points] == [False, False, True, False]
    assert curve.marked == [4.0]
    found = curve.to_dict()
    assert (found["lowest_exponent"], found["highest_exponent"]) == (0.0, None)
    assert found["points"][2] == {
        "concurrency": 4,
        "output_throughput": 80.0,
        "exponent": pytest.approx(-0.248, abs=1e-3),
        "is_super_linear": True,
    }


def test_time_that_grows_too_fast_is_marked() -> None:
    measured = [(128.0, 1.0, {"a": 1}), (256.5, 4.0, {}), (513.0, 20.0, {})]
    curve = Curve.through("first_token", "input_len", "ttft_ms", measured, highest=2.0)
    assert curve.marked == [513.0]  # 1.99, then 2.32
    points = curve.to_dict()["points"]
    assert (points[0]["a"], points[1]["input_len"]) == (1, 256.5)


def test_doublings() -> None:
    assert doublings(128, 600) == [128, 256, 512]
    assert doublings(128, 600, with_last=True) == [128, 256, 512, 600]
    assert doublings(128, 512, with_last=True) == [128, 256, 512]
    assert doublings(128, 100) == [100]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 5.0], [1, 2, 5]),
        ([3.0, 30.0], [2, 5, 10, 20, 50]),
        ([7.0], [5, 10]),
        ([10.0], [10, 20]),
        ([0.03, 0.04], [0.02, 0.05]),
        ([], []),
    ],
)
def test_round_numbers_enclose_what_is_drawn(values: list[float], expected: list[float]) -> None:
    assert round_numbers(values) == pytest.approx(expected)


def test_resident_memory(tmp_path: Path) -> None:
    statm = tmp_path / "statm"
    statm.write_text("900 300 20 1 0 50 0\n")
    found = resident_bytes(statm)
    assert found.source == NOW
    assert found.num_bytes % 300 == 0
    assert found.num_bytes // 300 in (4096, 16384, 65536)


@pytest.mark.parametrize("text", [None, "", "900", "900 many"])
def test_where_the_system_does_not_tell_it_is_the_peak(tmp_path: Path, text: str | None) -> None:
    statm = tmp_path / "statm"
    if text is not None:
        statm.write_text(text)
    found = resident_bytes(statm)
    assert found.source == PEAK
    assert found.num_bytes > 1 << 20
