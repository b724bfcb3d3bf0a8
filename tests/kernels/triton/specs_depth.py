"""Depth routing and sampling as an H200 runs them: bfloat16 hidden states, the paper's sizes."""

from __future__ import annotations

from typing import Any

from momaserve.kernels.triton import depth_kernels, routing, sampling, sampling_kernels
from tests.kernels.triton.compiled import KernelSpec

WIDTH, VOCAB = 2048, 65536
_TABLES = {
    "sequences": "*i32",
    "positions": "*i32",
    "cu_seqlens_q": "*i32",
    "block_tables": "*i32",
    "entry_tables": "*i32",
    "num_entries": "*i32",
    "index": "*i32",
    "slots": "*i32",
    "listed": "*i32",
    "places": "*i32",
    "count": "*i32",
    "taken": "*i8",
    "num_rows": "i32",
    "blocks_stride": "i32",
    "entries_stride": "i32",
    "num_entry_blocks": "i32",
    "block_size": "i32",
    "block_stride": "i32",
}
_SELECTION = {
    "modality": "*i8",
    "policy": "*i8",
    "thresholds": "*fp32",
    "groups": "*i32",
    "logits": "*fp32",
    "partials": "*fp32",
    "weights": "*fp32",
    "num_slices": "i32",
    "num_sequences": "i32",
}
_LISTS = {"counts": "*i32", "entries_before": "*i32"}


def _take(rows: int, num_slices: int, *, is_all: bool, has_choice: bool = False) -> KernelSpec:
    """has_choice: for prompts under expert choice."""
    choice = {"chosen": "*i8"} if has_choice else {}
    constexprs: dict[str, Any] = {
        **({} if has_choice else {"chosen": None}),
        "BLOCK_T": rows,
        "BLOCK_A": routing.summed_slices(num_slices, rows),
        "B_PAD": 512,
        "IS_ALL": is_all,
    }
    return KernelSpec(
        name=f"take rows rows={rows} is_all={is_all}" + (", chosen" if has_choice else ""),
        kernel=depth_kernels.take_rows,
        signature={**_SELECTION, **_TABLES, **choice, **({} if is_all else _LISTS)},
        constexprs={**constexprs, **(dict.fromkeys(_LISTS) if is_all else {})},
        hot=True,
    )


_ROW = {
    "logits": "*fp32",
    "bias": "*fp32",
    "masks": "*i8",
    "choices": "*i32",
    "bests": "*fp32",
    "best_ids": "*i32",
    "logits_stride": "i32",
    "masks_stride": "i32",
    "size": "i32",
}
_HOW = {"temperature": "*fp64", "top_k": "*i32", "top_p": "*fp64", "min_p": "*fp64"}
_PARTS = {"counts": "*i32", "sums": "*fp64"}
_SLICES = {"SLICE": sampling.SLICE, "PAD": VOCAB // sampling.SLICE}
_RUNGS = {**_SLICES, "DISTANCES": sampling.DISTANCES}
_DIVISIBLE = ("logits_stride", "masks_stride", "size")


def _sampling(*, has_bias: bool) -> list[KernelSpec]:
    row = {name: kind for name, kind in _ROW.items() if has_bias or name != "bias"}
    bias = {} if has_bias else {"bias": None}
    what = "" if has_bias else ", no bias"
    return [
        KernelSpec(
            name=f"survey of logits{what}",
            kernel=sampling_kernels.survey,
            signature={**row, "finites": "*i8"},
            constexprs={"SLICE": sampling.SLICE, **bias},
            divisible=_DIVISIBLE,
        ),
        KernelSpec(
            name=f"weights of logits{what}",
            kernel=sampling_kernels.weigh,
            signature={**row, **_HOW, **_PARTS},
            constexprs={**_RUNGS, **bias},
            divisible=_DIVISIBLE,
        ),
        KernelSpec(
            name=f"draw{what}",
            kernel=sampling_kernels.draw,
            signature={
                **row,
                **_HOW,
                **_PARTS,
                "uniforms": "*fp64",
                "finites": "*i8",
                "orders": "*i32",
                "weights": "*fp32",
                "ids": "*i32",
                "token_ids": "*i64",
                "are_finite": "*i8",
                "num_slices": "i32",
            },
            constexprs={**_RUNGS, "LISTED": sampling.LISTED, **bias},
            divisible=_DIVISIBLE,
            num_warps=sampling.DRAW_WARPS,
        ),
    ]


SPECS = [
    _take(1, 256, is_all=True),
    _take(64, 32, is_all=True),
    _take(64, 16, is_all=False),
    _take(64, 16, is_all=False, has_choice=True),
    KernelSpec(
        name="enter rows T=8192",
        kernel=depth_kernels.enter_rows,
        signature={**_TABLES, **_LISTS},
        constexprs={"BLOCK_T": 64, "TILES_PAD": 128},
        hot=True,
    ),
    KernelSpec(
        name="gather",
        kernel=depth_kernels.gather,
        signature={"x": "*bf16", "rows": "*i32", "out": "*bf16", "x_stride": "i32"},
        constexprs={"WIDTH": WIDTH, "BLOCK": 1024},
        divisible=("x_stride",),
        hot=True,
    ),
    KernelSpec(
        name="blend",
        kernel=depth_kernels.blend,
        signature={
            "x": "*bf16",
            "block": "*bf16",
            "weight": "*fp32",
            "places": "*i32",
            "out": "*bf16",
            "x_stride": "i32",
            "block_stride": "i32",
            "out_stride": "i32",
        },
        constexprs={"WIDTH": WIDTH, "BLOCK": 1024},
        divisible=("x_stride", "block_stride", "out_stride"),
        hot=True,
    ),
    *_sampling(has_bias=True),
    *_sampling(has_bias=False),
]
