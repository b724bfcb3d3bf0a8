"""Arithmetic of architectures: equal FLOPs, bytes of weights and of steps, and what fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from momaserve.errors import ConfigError
from momaserve.layers.routing import Router
from momaserve.models.config import ModelConfig
from momaserve.models.presets import preset_config
from momaserve.models.random_weights import random_model
from momaserve_bench import architectures_cost
from momaserve_bench.architectures_cost import (
    active_flops,
    available_bytes,
    expected_step_bytes,
    groups_that_fit,
    kv_cache_bytes,
    needed_bytes,
    weight_bytes,
)
from momaserve_bench.architectures_options import PRESETS, SIZES
from momaserve_bench.peers.contest import Case
from tests.reference.checkpoints import CASES, random_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_CASE = Case(kind="decode", batch_size=3, input_len=10, output_len=20)


def config(experts: str, size: str = "90m") -> ModelConfig:
    return preset_config(PRESETS[experts].format(size=size))


@pytest.mark.parametrize("size", SIZES)
def test_active_flops_are_equal_but_for_routers(size: str) -> None:
    dense = active_flops(config("dense", size))
    assert dense == active_flops(config("1t1i", size))
    for name in ("moe_8x", "4t4i"):
        for modality, count in active_flops(config(name, size)).items():
            assert 1 < count / dense[modality] < 1.04


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", ["4t4i_post", "dense_pre", "depth_4t4i_pre"])
def test_weights_are_what_a_model_holds(tmp_path: Path, case: str, dtype: str) -> None:
    small = ModelConfig.from_dict(random_checkpoint(tmp_path, seed=1, **CASES[case]))
    device = torch.device("cpu")
    model = random_model(small, seed=0, dtype=getattr(torch, dtype), device=device)
    held = sum(weight.nbytes for weight in model.parameters())
    routers = [module for module in model.modules() if isinstance(module, Router)]
    held += sum(r.threshold_logits.nbytes for r in routers if r.threshold_logits is not None)
    assert weight_bytes(small, dtype) == held


def test_the_cache_has_room_for_whole_blocks_and_one_more() -> None:
    dense = config("dense")
    token = 2 * 8 * 512 * 2  # K and V, 8 layers of width 512, in bfloat16
    # 10 + 20 tokens and the marks of a picture are two blocks of 16.
    assert kv_cache_bytes(dense, [_CASE], "bfloat16") == 3 * 3 * 16 * token
    assert kv_cache_bytes(dense, [_CASE], "float32") == 2 * 3 * 3 * 16 * token
    longer = Case(kind="prefill", batch_size=1, input_len=1000, output_len=1)
    assert kv_cache_bytes(dense, [_CASE, longer], "bfloat16") == (63 + 1) * 16 * token


def test_what_is_needed_grows_with_weights() -> None:
    small, large = (needed_bytes(config(n), [_CASE], "bfloat16") for n in ("dense", "4t4i"))
    more = weight_bytes(config("4t4i"), "bfloat16") - weight_bytes(config("dense"), "bfloat16")
    assert large - small == pytest.approx(1.5 * more, abs=1)
    assert small > weight_bytes(config("dense"), "bfloat16")


# --- what fits -----------------------------------------------------------------------------

_NEEDED = {"dense": 10, "moe_8x": 40, "4t4i": 50}


@pytest.mark.parametrize("available", [None, 100, 1000])
def test_all_run_together_where_there_is_room(available: int | None) -> None:
    assert groups_that_fit(_NEEDED, available) == [("dense", "moe_8x", "4t4i")]


@pytest.mark.parametrize("available", [60, 99])
def test_dense_runs_beside_one_other_where_there_is_less(available: int) -> None:
    assert groups_that_fit(_NEEDED, available) == [("dense", "moe_8x"), ("dense", "4t4i")]


def test_what_does_not_fit_is_refused_by_name() -> None:
    giga = {name: 10**9 * number for name, number in _NEEDED.items()}
    message = r"^no room for 4t4i \(50\.0 GB\) beside dense \(10\.0 GB\): 59\.0 GB of memory can"
    with pytest.raises(ConfigError, match=message):
        groups_that_fit(giga, 59 * 10**9)
    with pytest.raises(ConfigError, match=r"no room for moe_8x \(40\.0 GB\), 4t4i"):
        groups_that_fit(giga, 49 * 10**9)
    with pytest.raises(ConfigError, match=r"no room for dense \(10\.0 GB\): 9\.0 GB"):
        groups_that_fit({"dense": 10**10}, 9 * 10**9)
    assert groups_that_fit({"dense": 10**10}, 10**10) == [("dense",)]


def test_free_memory_is_read_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "meminfo"
    monkeypatch.setattr(architectures_cost, "_MEMORY", file)
    assert available_bytes() is None
    file.write_text("MemTotal:       200 kB\nMemAvailable:    7 kB\n", encoding="utf-8")
    assert available_bytes() == 7 * 1024
    file.write_text("MemTotal:       200 kB\n", encoding="utf-8")
    assert available_bytes() is None


# --- bytes of a step -----------------------------------------------------------------------


def expected(experts: str, rows: str, batch: int, context: int = 64) -> float:
    model = config(experts)
    return expected_step_bytes(model, rows, batch, context=context, dtype="bfloat16")


_EXPERT = 8 * 3 * 512 * 1365 * 2
"""Bytes of one expert, all layers."""
_ROW = 512 * 2 + 64 * 2 * 8 * 512 * 2
"""Of a row: its embedding, and K and V of 64 tokens."""


@pytest.mark.parametrize(
    ("rows", "batch", "distinct"),
    [
        ("text", 1, 1),
        ("text", 2, 4 * (1 - 0.75**2)),
        ("image", 4, 4 * (1 - 0.75**4)),
        ("mixed", 4, 2 * 4 * (1 - 0.75**2)),
    ],
)
def test_distinct_experts_of_independent_tokens(rows: str, batch: int, distinct: float) -> None:
    num_groups = 2 if rows == "mixed" else 1
    routers = 4 * 8 * (4 * 512 + 256 * (512 + 4)) * num_groups
    experts = expected("4t4i", rows, batch) - expected("dense", rows, batch) - routers
    assert experts == pytest.approx((distinct - 1) * _EXPERT)


def test_one_expert_per_modality_costs_more_where_both_are_there() -> None:
    assert expected("1t1i", "text", 4) == expected("dense", "text", 4)
    assert expected("1t1i", "mixed", 4) == expected("dense", "mixed", 4) + _EXPERT


def test_a_row_more_costs_its_own_tokens() -> None:
    assert expected("dense", "text", 2) - expected("dense", "text", 1) == _ROW


def test_the_page_has_these_numbers() -> None:
    """Every line of the page's tables of bytes and FLOPs."""
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith(tuple(f"| {size} |" for size in SIZES))
    ]
    others = [name for name in PRESETS if name != "dense"]
    steps, flops = [c for c in lines if len(c) == 7], [c for c in lines if len(c) == 4]
    assert (len(steps), len(flops)) == (16, 2)
    for size, rows, batch, mega, *shown in steps:
        found = {
            name: expected_step_bytes(
                config(name, size), rows, int(batch), context=64, dtype="bfloat16"
            )
            for name in PRESETS
        }
        assert mega == f"{found['dense'] / 1e6:.0f}"
        assert shown == [f"{found[name] / found['dense']:.2f}" for name in others]
    for size, *shown in flops:
        count = {name: active_flops(config(name, size))["text"] for name in PRESETS}
        assert shown == [f"{count[name] / count['dense']:.3f}" for name in others]
