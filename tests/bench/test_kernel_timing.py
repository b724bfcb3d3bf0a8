"""How kernels are timed: copies, turns and rates, with numbers made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from momaserve.errors import ConfigError
from momaserve_bench.kernels import tables
from momaserve_bench.kernels.caches import last_level_bytes
from momaserve_bench.kernels.case import KERNEL, Case, Contender, Contest, Ready, judge
from momaserve_bench.kernels.timing import (
    CopyPlan,
    Filler,
    Roofs,
    geometric_mean,
    hold,
    measure_gemm,
    plan_copies,
    rates,
)

ONE_COPY = CopyPlan(copies=1, filler_bytes=0, is_cold=False)


def no_contest() -> Contest:
    raise AssertionError("nothing is to be built")


def case(**changes: Any) -> Case:
    return replace(
        Case(
            kernel="linear.linear",
            what="o 4x5",
            rows=2,
            flops=6000.0,
            num_bytes=3000.0,
            state_bytes=100,
            touched_bytes=100,
            held_bytes=50,
            build=no_contest,
        ),
        **changes,
    )


def plan(
    one: Case,
    *,
    cache: int | None = 400,
    memory: int = 10_000,
    num_iters: int = 30,
    is_warm: bool = False,
) -> CopyPlan | None:
    return plan_copies(
        one, cache_bytes=cache, memory_bytes=memory, num_iters=num_iters, is_warm=is_warm
    )


# --- copies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "settings", "copies", "filler", "is_cold"),
    [
        ({}, {}, 8, 0, True),  # twice the cache of 400
        ({}, {"num_iters": 3}, 3, 500, True),  # no more copies than turns
        ({}, {"memory": 750}, 7, 0, True),  # 50 are held besides
        ({}, {"memory": 450}, 4, 0, False),  # all of it fits into the cache
        ({}, {"memory": 150}, 1, 0, False),
        ({"state_bytes": 1000, "touched_bytes": 1000}, {}, 1, 0, True),
        ({"touched_bytes": 40}, {}, 20, 0, True),  # the rest of each copy evicts nothing
        ({"touched_bytes": 40}, {"memory": 1050}, 10, 0, False),
        ({}, {"cache": None}, 30, 6966, None),
        ({}, {"cache": None, "num_iters": 1000}, 99, 0, None),
        ({"state_bytes": 0, "touched_bytes": 0}, {}, 1, 0, False),
        ({}, {"is_warm": True}, 1, 0, False),
    ],
)
def test_copies_push_each_other_out_of_the_cache(
    changes: dict[str, int],
    settings: dict[str, Any],
    copies: int,
    filler: int,
    is_cold: bool | None,
) -> None:
    found = plan(case(**changes), **settings)
    assert found is not None
    assert (found.copies, found.is_cold) == (copies, is_cold)
    target = 800 if settings.get("cache", 400) else 9950
    assert filler - target // 32 <= found.filler_bytes <= filler


@pytest.mark.parametrize("memory", [0, 149])
def test_without_room_for_one_copy_there_is_no_plan(memory: int) -> None:
    assert plan(case(), memory=memory) is None
    assert plan(case(state_bytes=0, touched_bytes=0), memory=49) is None


def test_the_filler_is_made_anew_only_for_another_size() -> None:
    filler = Filler()
    filler.read()
    filler.resize(4000)
    first = filler._buffer
    filler.resize(4000)
    assert filler._buffer is first
    assert float(first.sum()) == 1000
    filler.resize(0)
    assert filler._buffer.nbytes == 0


@pytest.mark.parametrize(
    ("caches", "expected"),
    [
        ({"index0": ("Data", "48K"), "index1": ("Instruction", "9M")}, 48 << 10),
        ({"index0": ("Data", "48K"), "index3": ("Unified", "33M")}, 33 << 20),
        ({"index0": ("Data", "1G"), "index1": ("Unified", "?")}, 1 << 30),
        ({"index0": ("Unified", "4096")}, 4096),
        ({"index0": ("Unified", "")}, None),
        ({}, None),
    ],
)
def test_the_largest_data_cache_is_the_last_level(
    tmp_path: Path, caches: dict[str, tuple[str, str]], expected: int | None
) -> None:
    for name, (kind, size) in caches.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(f"{kind}\n")
        (tmp_path / name / "size").write_text(f"{size}\n")
    assert last_level_bytes(tmp_path) == expected
    assert last_level_bytes(tmp_path / "nowhere") is None


# --- turns ---------------------------------------------------------------------------------


class Log:
    """Contenders that write down what is asked of them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int]] = []

    def contender(self, name: str, value: float = 1.0, tolerance: float = 0.0) -> Contender:
        made = 0

        def make() -> Ready:
            nonlocal made
            copy = made
            made += 1

            def run() -> Tensor:
                self.calls.append(("run", name, copy))
                return torch.tensor([value])

            return Ready(run, lambda: self.calls.append(("prepare", name, copy)))

        return Contender(name, make, tolerance)

    def runs(self) -> list[tuple[str, int]]:
        """(contender, copy) of every run; each was prepared just before."""
        pairs = list(zip(self.calls[::2], self.calls[1::2], strict=True))
        assert all((a[0], b[0]) == ("prepare", "run") and a[1:] == b[1:] for a, b in pairs)
        return [b[1:] for _, b in pairs]


def compete(contest: Contest, plan: CopyPlan = ONE_COPY, num_iters: int = 4) -> Any:
    return hold(contest, plan, num_iters=num_iters, filler=Filler(), pause_s=0.0)


def test_contenders_take_turns_and_copies_go_round() -> None:
    log = Log()
    contest = Contest((log.contender("a"), log.contender("b")), judge(torch.ones(1)))
    found = compete(contest, CopyPlan(copies=3, filler_bytes=8, is_cold=True))
    runs = log.runs()
    assert runs[:4] == [("a", 0), ("b", 0), ("a", 0), ("b", 0)]  # compared, and warmed up
    assert runs[4:] == [
        *(("a", 0), ("b", 0)),
        *(("b", 1), ("a", 1)),
        *(("a", 2), ("b", 2)),
        *(("b", 0), ("a", 0)),
    ]
    assert {name: len(times) for name, times in found.seconds.items()} == {"a": 4, "b": 4}
    assert found.errors == {"a": 0.0, "b": 0.0}
    assert not found.differing


@pytest.mark.parametrize("value", [1.2, float("nan"), float("inf")])
def test_what_differs_is_named_and_not_timed(value: float) -> None:
    log = Log()
    good, bad = log.contender("a", 1.05, tolerance=0.1), log.contender("b", value, tolerance=0.1)
    found = compete(Contest((good, bad), judge(torch.ones(1))))
    assert found.differing == ["b"]
    assert found.errors["a"] == pytest.approx(0.05)
    assert not found.seconds
    assert log.runs() == [("a", 0), ("b", 0)]


def test_errors_are_shares_of_the_largest_value() -> None:
    error = judge(torch.tensor([1.0, -4.0]))
    assert error(torch.tensor([1.0, -4.0])) == 0
    assert error(torch.tensor([1.0, -3.0])) == 0.25
    assert error(torch.tensor([1.0])) == float("inf")
    assert judge(torch.zeros(2))(torch.zeros(2)) == 0
    assert judge(torch.zeros(2))(torch.tensor([0.0, 1e-3])) > 1


# --- rates ---------------------------------------------------------------------------------


def test_rates_by_hand() -> None:
    """6,000 operations and 3,000 bytes in 2 us: 3 GFLOP/s and 1.5 GB/s."""
    seconds = {KERNEL: [9e-6, 2e-6, 1e-6], "slow": [8e-6] * 3, "quick": [3e-6] * 3}
    roofs = Roofs(read_bytes_per_s=6e9, float32_flops_per_s=12e9)
    found = rates(case(), seconds, roofs)
    assert found["gflop_per_s"] == pytest.approx(3.0)
    assert found["gb_per_s"] == pytest.approx(1.5)
    assert found["arithmetic_share"] == found["bandwidth_share"] == pytest.approx(0.25)
    assert (found["best_torch"], found["ratio"]) == ("quick", pytest.approx(1.5))
    assert found["microseconds"] == pytest.approx({KERNEL: 2.0, "slow": 8.0, "quick": 3.0})
    assert found["fastest_microseconds"][KERNEL] == pytest.approx(1.0)


def test_a_kernel_that_computes_nothing_has_no_rate_of_arithmetic() -> None:
    roofs = Roofs(read_bytes_per_s=6e9, float32_flops_per_s=12e9)
    found = rates(case(flops=0.0), {KERNEL: [1e-6], "torch": [5e-7]}, roofs)
    assert (found["gflop_per_s"], found["arithmetic_share"]) == (None, None)
    assert found["ratio"] == pytest.approx(0.5)


def test_means_of_ratios_are_geometric() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([8.0, 2.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None


def test_the_roof_of_arithmetic() -> None:
    assert measure_gemm(16) > 0
    with pytest.raises(ConfigError, match="no room for products of --gemm-size 10000000"):
        measure_gemm(10_000_000)


# --- tables --------------------------------------------------------------------------------


def _here(reason: str | None) -> Callable[[], str | None]:
    return lambda: reason


def test_backends_that_cannot_run_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = tables.Table("x", _here(None), "none"), tables.Table("y", _here("no y"), "none")
    monkeypatch.setattr(tables, "TABLES", (bad, good))
    assert tables.tables_here() == [good]
    monkeypatch.setattr(tables, "TABLES", (bad,))
    with pytest.raises(ConfigError, match="no compiled kernels to measure: y: no y"):
        tables.tables_here()
