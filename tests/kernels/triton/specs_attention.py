"""Attention and what lies around it as GPUs run it: the paper's shapes, blocks of 16 and 32."""

from __future__ import annotations

from momaserve.kernels.triton import attention_kernels, heads, norms
from momaserve.kernels.triton.attention_tiles import STATISTICS, decode_tiles, prefill_tiles
from momaserve.kernels.triton.jit import power_of_2
from tests.kernels.triton.compiled import KernelSpec

STRIDES = ("q_stride", "out_stride", "table_stride", "block_stride", "layer_offset")
PAGED = {
    "q": "*{}",
    "keys": "*{}",
    "values": "*{}",
    "block_tables": "*i32",
    "seq_lens": "*i32",
    "cu_seqlens_q": "*i32",
    "index": "*i32",
    "parts": "*fp32",
    "out": "*{}",
    **dict.fromkeys(STRIDES, "i32"),
    "num_rows": "i32",
    "scale": "fp32",
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def paged(left_out: tuple[str, ...], dtype: str) -> dict[str, str]:
    return {name: t.format(dtype) for name, t in PAGED.items() if name not in left_out}


def decoding(
    *,
    head_dim: int,
    shared: int = 1,
    block_size: int = 16,
    routed: bool = False,
    direct: bool = False,
    dtype: str = "bf16",
) -> KernelSpec:
    tiles = decode_tiles(shared, head_dim, ITEMSIZE[dtype])
    left_out = (() if routed else ("index",)) + (("parts",) if direct else ())
    words = f" R={shared} block={block_size}" + " routed" * routed + " direct" * direct
    return KernelSpec(
        name=f"decode {dtype} K={head_dim}{words}",
        kernel=attention_kernels.decode,
        signature=paged(left_out, dtype),
        constexprs={
            **dict.fromkeys(left_out),
            "NUM_KV_HEADS": 16 // shared,
            "SHARED": shared,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "ROWS": tiles.rows,
            "POSITIONS": tiles.positions,
            "MIN_TILES": tiles.min_tiles,
            "PART": head_dim + STATISTICS,
            "STAGES": tiles.stages,
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        },
        divisible=("q_stride", "out_stride", "block_stride"),
        num_warps=tiles.warps,
        hot=True,
        instructions=("cp.async.16", "mma.sync"),
        resident=tiles.resident,
    )


def prefilling(
    *,
    max_q: int,
    head_dim: int,
    shared: int = 1,
    block_size: int = 16,
    routed: bool = False,
    dtype: str = "bf16",
) -> KernelSpec:
    tiles = prefill_tiles(max_q, shared, head_dim, ITEMSIZE[dtype])
    left_out = ("parts",) if routed else ("parts", "index")
    words = f" R={shared} block={block_size} max_q={max_q}" + " routed" * routed
    return KernelSpec(
        name=f"prefill {dtype} K={head_dim}{words}",
        kernel=attention_kernels.prefill,
        signature=paged(left_out, dtype),
        constexprs={
            **({} if routed else {"index": None}),
            "NUM_KV_HEADS": 16 // shared,
            "SHARED": shared,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": block_size,
            "ROWS": tiles.rows,
            "POSITIONS": tiles.positions,
            "STAGES": tiles.stages,
            "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
        },
        divisible=("q_stride", "out_stride", "block_stride"),
        num_warps=tiles.warps,
        hot=True,
        instructions=("cp.async.16",),
    )


def joining(head_dim: int, splits: int) -> KernelSpec:
    return KernelSpec(
        name=f"join K={head_dim} splits={splits}",
        kernel=attention_kernels.join,
        signature={
            "parts": "*fp32",
            "seq_lens": "*i32",
            "cu_seqlens_q": "*i32",
            "out": "*bf16",
            "out_stride": "i32",
            "num_rows": "i32",
            "num_splits": "i32",
        },
        constexprs={
            "HEAD_DIM": head_dim,
            "POSITIONS": 16,
            "MIN_TILES": 4,
            "PART": head_dim + STATISTICS,
            "SPLITS": power_of_2(splits),
        },
        divisible=("out_stride",),
        num_warps=4,
        hot=True,
    )


def placing(head_dim: int, *, normed: bool) -> KernelSpec:
    norms = {} if normed else {"weight": None, "bias": None}
    signature = dict.fromkeys(("qkv", "weight", "bias", "out", "keys", "values"), "*bf16")
    signature |= {"table": "*fp32", "positions": "*i64", "slots": "*i32", "eps": "fp32"}
    signature |= dict.fromkeys(("qkv_stride", "out_stride", "table_rows", "layer_offset"), "i32")
    return KernelSpec(
        name=f"place_heads K={head_dim}" + " normed" * normed,
        kernel=heads._place_heads,
        signature={name: t for name, t in signature.items() if name not in norms},
        constexprs={
            **norms,
            "NUM_HEADS": 16,
            "NUM_KV_HEADS": 16,
            "HEAD_DIM": head_dim,
            "NORMED": normed,
            "TILE": heads.heads_for(head_dim),
        },
        divisible=("qkv_stride", "out_stride"),
        num_warps=1,
        hot=True,
    )


def norming(kernel: str, width: int) -> KernelSpec:
    function = getattr(norms, kernel)
    tensors = [n for n in ("x", "y", "weight", "out_sum", "out") if n in function.arg_names]
    strides = [n for n in function.arg_names if n.endswith("_stride")]
    return KernelSpec(
        name=f"{kernel} D={width}",
        kernel=function,
        signature=dict.fromkeys(tensors, "*bf16") | dict.fromkeys(strides, "i32") | {"eps": "fp32"},
        constexprs={"WIDTH": width, "BLOCK": power_of_2(width)},
        divisible=tuple(strides),
        num_warps=norms.warps_for(width),
        hot=True,
    )


SPECS = [
    decoding(head_dim=64),
    decoding(head_dim=128),
    decoding(head_dim=128, shared=4, block_size=32, direct=True),
    decoding(head_dim=128, routed=True),
    decoding(head_dim=64, dtype="fp32"),
    joining(64, 64),
    prefilling(head_dim=64, max_q=2048),
    prefilling(head_dim=128, max_q=2048),
    prefilling(head_dim=128, max_q=64, shared=4, block_size=32),
    prefilling(head_dim=128, max_q=2048, routed=True),
    prefilling(head_dim=64, max_q=2048, dtype="fp32"),
    placing(64, normed=True),
    norming("_rms_norm", 2048),
    norming("_add_normed", 1024),
    norming("_normed_sum", 2304),
]
