"""`gpu.sh tune`: the search over tile sizes, and that what it tries is what serves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.bench.gpu_stub import StubDevice  # first: it chooses the interpreter

# isort: split
from momaserve.kernels.triton import attention_tiles, experts
from momaserve.kernels.triton.attention_tiles import Tiles
from momaserve.kernels.triton.experts import DirectTiles, GroupedTiles
from momaserve_bench.gpu import tuning
from momaserve_bench.gpu.device import Budget
from momaserve_bench.gpu.tuning import FULL, Search, TuningSizes, tune

SIZES = TuningSizes(
    dtype="float32",
    width=32,
    inner=21,
    num_experts=4,
    num_layers=2,
    heads=(2, 1),
    head_dim=16,
    block_size=16,
    works=(("direct", 2, 1), ("grouped", 9, 1), ("decoding", 2, 70), ("prompts", 2, 20)),
    num_runs=1,
    num_warmup=0,
    inner_runs=1,
)
TODAY = Tiles(rows=16, positions=16, warps=1, stages=2)


def searched(costs: dict[tuple[int, int], float | str], budget_s: float = 1e9) -> Search[Tiles]:
    """A search over positions and warps, which take so many microseconds, or fail."""

    def measure(tiles: Tiles) -> float:
        cost = costs[tiles.positions, tiles.warps]
        if isinstance(cost, str):
            raise RuntimeError(cost + "\nand more")
        return 1e-6 * cost

    return Search(TODAY, {"positions": (16, 32, 64), "warps": (1, 2)}, measure)


def test_what_is_quicker_is_kept_and_built_upon() -> None:
    search = searched({(16, 1): 100, (32, 1): 80, (64, 1): "no room", (32, 2): 60})
    found = search.run(Budget(StubDevice(), 1e9))
    assert search.tiles == replace(TODAY, positions=32, warps=2)
    assert found["before"] == repr(TODAY) and found["best"] == repr(search.tiles)
    assert (found["before_us"], found["best_us"]) == pytest.approx((100, 60))
    assert found["ratio"] == pytest.approx(100 / 60)
    assert found["tried"] == {
        "as it is": pytest.approx(100),
        "positions 32": pytest.approx(80),
        "positions 64": "RuntimeError: no room",
        "warps 2": pytest.approx(60),
    }


def test_a_little_quicker_is_noise() -> None:
    search = searched({(16, 1): 100, (32, 1): 98, (64, 1): 101, (16, 2): 99})
    assert search.run(Budget(StubDevice(), 1e9))["best"] == repr(TODAY)


def test_nothing_new_is_begun_once_the_time_is_over() -> None:
    found = searched({(16, 1): 100}).run(Budget(StubDevice(), 0.0))
    assert list(found["tried"]) == ["as it is"] and found["ratio"] == 1


def test_every_work_is_searched(capsys: pytest.CaptureFixture[str]) -> None:
    device = StubDevice()
    kept: list[object] = []
    report = tune(device, Budget(device, 1e9), seed=3, sizes=SIZES, keep=kept.append)
    assert report["failures"] == {} and report["left_out"] == []
    works = ["direct, 2 rows", "grouped, 9 rows", "decoding, 2 x 70", "prompts, 2 x 20"]
    assert list(report["searches"]) == works
    assert len(kept) == 4
    for found in report["searches"].values():
        # All times are alike on this clock, so each value was tried once, and computed the same.
        assert found["best"] == found["before"]
        assert all(isinstance(us, float) for us in found["tried"].values()), found["tried"]
    counts = [len(found["tried"]) for found in report["searches"].values()]
    assert counts == [13, 23, 11, 8]
    assert "grouped, 9 rows" in capsys.readouterr().out


def test_works_beyond_the_time_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    device = StubDevice()
    report = tune(device, Budget(device, 0.0), seed=3, sizes=SIZES)
    assert report["searches"] == {} and len(report["left_out"]) == 4
    assert "left out: prompts, 2 x 20" in capsys.readouterr().out


def test_tiles_that_compute_something_else_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = experts.direct

    def wrong(
        u: object, pairs: object, weights: object, tiles: DirectTiles, *rest: object
    ) -> object:
        return plain(u, pairs, weights, tiles, *rest) * (1 + (tiles.up_warps == 2))

    monkeypatch.setattr(experts, "direct", wrong)
    device = StubDevice()
    sizes = replace(SIZES, works=(("direct", 2, 1),))
    report = tune(device, Budget(device, 1e9), seed=3, sizes=sizes)
    tried = report["searches"]["direct, 2 rows"]["tried"]
    assert tried["up_warps 2"].startswith("OtherResultError: differs by ")
    assert isinstance(tried["up_warps 8"], float)


def test_todays_tiles_that_fail_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(experts, "grouped", broken)
    device = StubDevice()
    report = tune(device, Budget(device, 1e9), seed=3, sizes=SIZES)
    assert report["failures"] == {"grouped, 9 rows": "RuntimeError: out of shared memory"}
    assert len(report["searches"]) == 3


def test_the_sets_hold_what_the_tables_have() -> None:
    """Else a search could not come back to it."""
    direct = [tiles for _, tiles in experts.DIRECT_TILES]
    grouped = [tiles for _, tiles in experts.GROUPED_TILES]
    assert all(type(tiles) is DirectTiles for tiles in direct)
    assert all(type(tiles) is GroupedTiles for tiles in grouped)
    for tables, choices in ((direct, tuning.DIRECT), (grouped, tuning.GROUPED)):
        for tiles in tables:
            for name, values in choices.items():
                assert getattr(tiles, name) in values, (tiles, name)
    row_bytes = FULL.head_dim * 2
    decode, prefill = attention_tiles.DECODE[row_bytes], attention_tiles.PREFILL[row_bytes]
    for sizes, choices in ((decode, tuning.DECODE), *((s, tuning.PREFILL) for s in prefill)):
        for name, values in choices.items():
            assert getattr(sizes, name) in values, (sizes, name)
