"""Causal attention over paged KV memory, for rows that decode and rows of prompts alike.

A decoding step (one row per sequence at most) splits each sequence's positions among programs
[G, splits, B], whose parts a second kernel joins; rows of prompts go in tiles [tiles, G, B], and
rows that decode in a step beside them are such tiles too. The query heads of one kv head share a
program, so K and V are read once for all of them.

q and out are [T, H, K]; rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] are the last of sequence b,
which has seq_lens[b] positions, those rows included. keys and values are [num_slots, G, K];
position s of sequence b lies in block t = block_tables[b, s // block_size], at slot
t * block_stride + layer_offset + s % block_size. With `index` int32 [num_blocks * block_size] it
lies at slot index[t * block_size + s % block_size], or nowhere (-1: the layer skipped it). Nothing
else is read, neither of tables nor of memory. A padding sequence has no rows and no positions. Rows
that see nothing, and rows of no sequence (those from cu_seqlens_q[B] on), come out zero.

Grids depend on shapes and bounds alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momaserve.kernels.triton.attention_kernels import decode, join, prefill
from momaserve.kernels.triton.attention_tiles import (
    STATISTICS,
    Tiles,
    decode_tiles,
    prefill_tiles,
)
from momaserve.kernels.triton.checks import check_head_dim, check_shape
from momaserve.kernels.triton.jit import ceil_div, power_of_2

LOG2_E = 1.4426950408889634


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    block_size: int,
    block_stride: int,
    layer_offset: int = 0,
    index: Tensor | None = None,
    max_q: int,
    max_len: int,
    scratch: Tensor | None = None,
    out: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Attention of every row over the positions up to its own: [T, H, K].

    Args:
        q: [T, H, K].
        keys, values: [num_slots, G, K].
        block_tables: int32 [B, max_blocks].
        seq_lens: int32 [B].
        cu_seqlens_q: int32 [B + 1].
        block_size: positions per block, a power of two.
        block_stride: slots per block.
        layer_offset: the layer's first slot within a block; 0 with `index`.
        index: int32 [num_blocks * block_size] of a depth-routed layer.
        max_q: no sequence has more rows; with 1 the step decodes.
        max_len: no sequence is longer.
        scratch: float32 of `attention_tiles.scratch_shape`, whose first size is the number of
            splits of a decoding step; None is one split.
        tiles: None are those of the tables.

    Raises:
        ValueError: shapes that do not fit, or bounds that the tables cannot hold.
    """
    num_rows, num_heads, head_dim = q.shape
    num_slots, num_kv_heads, _ = keys.shape
    batch = len(seq_lens)
    out = torch.empty_like(q) if out is None else out
    check_head_dim(head_dim)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not share {num_kv_heads} kv heads evenly")
    if block_size < 1 or block_size & (block_size - 1) or block_stride < 1:
        raise ValueError(f"blocks of {block_size} positions, {block_stride} slots apart")
    check_shape("q", q, (num_rows, num_heads, head_dim))
    check_shape("out", out, (num_rows, num_heads, head_dim))
    check_shape("block_tables", block_tables, (batch, -1))
    check_shape("cu_seqlens_q", cu_seqlens_q, (batch + 1,))
    for name, memory in (("keys", keys), ("values", values)):
        check_shape(name, memory, (num_slots, num_kv_heads, head_dim))
        if not memory.is_contiguous():
            raise ValueError(f"{name} must be contiguous, has strides {memory.stride()}")
    if not 0 <= max_len <= block_tables.shape[1] * block_size:
        raise ValueError(f"max_len {max_len} does not fit into tables {list(block_tables.shape)}")
    if not num_rows or not batch:
        return out.zero_()
    shared = num_heads // num_kv_heads
    arguments = (q, keys, values, block_tables, seq_lens, cu_seqlens_q, index)
    strides = (q.stride(0), out.stride(0), block_tables.stride(0), block_stride, layer_offset)
    scale = head_dim**-0.5 * LOG2_E
    constants = {
        "NUM_KV_HEADS": num_kv_heads,
        "SHARED": shared,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "PRECISION": "tf32x3" if q.dtype is torch.float32 else "ieee",
    }
    if max_q > 1:
        tiles = tiles or prefill_tiles(max_q, shared, head_dim, q.element_size())
        grid = (ceil_div(max_q, tiles.rows // shared), num_kv_heads, batch)
        prefill[grid](
            *arguments,
            out,
            *strides,
            num_rows,
            scale,
            ROWS=tiles.rows,
            POSITIONS=tiles.positions,
            STAGES=tiles.stages,
            num_warps=tiles.warps,
            **constants,
        )
        return out
    if scratch is not None:
        check_shape("scratch", scratch, (-1, batch, num_heads, head_dim + STATISTICS))
        if not scratch.is_contiguous():
            raise ValueError(f"scratch must be contiguous, has strides {scratch.stride()}")
    num_splits = 1 if scratch is None else len(scratch)
    parts = scratch if num_splits > 1 else None
    tiles = tiles or decode_tiles(shared, head_dim, q.element_size())
    decode[(num_kv_heads, num_splits, batch)](
        *arguments,
        parts,
        out,
        *strides,
        num_rows,
        scale,
        ROWS=tiles.rows,
        POSITIONS=tiles.positions,
        MIN_TILES=tiles.min_tiles,
        PART=head_dim + STATISTICS,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        **constants,
    )
    if parts is not None:
        join[(num_heads, batch)](
            parts,
            seq_lens,
            cu_seqlens_q,
            out,
            out.stride(0),
            num_rows,
            num_splits,
            HEAD_DIM=head_dim,
            POSITIONS=tiles.positions,
            MIN_TILES=tiles.min_tiles,
            PART=head_dim + STATISTICS,
            SPLITS=power_of_2(num_splits),
            num_warps=4,
        )
    return out
