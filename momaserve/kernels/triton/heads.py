"""What lies between the fused q, k, v projection and attention, in one launch.

Of each row the query and key heads pass a LayerNorm of their own (if there is one) and the
rotation of the row's position; queries are written out, keys and values go to the row's KV slot.
One program per row and few heads; everything between load and store is float32.

qkv is [T, (H + 2G) K], rows anywhere: query heads, key heads, value heads. A padding row has slot
-1, which keeps the row from KV memory, and any position; its queries come out finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momaserve.kernels.triton.checks import check_head_dim, check_shape
from momaserve.kernels.triton.jit import ceil_div, kernel_for_any, power_of_2, tl


def heads_for(head_dim: int) -> int:
    """Heads of one program, a warp: each thread loads 16 bytes of either half of a head."""
    return max(1, 512 // head_dim)


@kernel_for_any("table_rows", "layer_offset")
def _place_heads(
    qkv: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    table: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    qkv_stride: tl.tensor,
    out_stride: tl.tensor,
    table_rows: tl.tensor,
    layer_offset: tl.tensor,
    eps: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORMED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Grid [T, ceil((H + 2G) / TILE)]; the halves of a head are apart, since they turn together."""
    HALF: tl.constexpr = HEAD_DIM // 2
    NUM_NORMED: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, HALF)
    places = heads[:, None] * HEAD_DIM + columns[None, :]
    exists = (heads < NUM_NORMED + NUM_KV_HEADS)[:, None]
    first = tl.load(qkv + row * qkv_stride + places, mask=exists, other=0.0).to(tl.float32)
    second = tl.load(qkv + row * qkv_stride + places + HALF, mask=exists, other=0.0).to(tl.float32)

    turns = (heads < NUM_NORMED)[:, None]
    a, b = first, second
    if NORMED:
        mean = (tl.sum(a, axis=1) + tl.sum(b, axis=1)) / HEAD_DIM
        a -= mean[:, None]
        b -= mean[:, None]
        variance = (tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / HEAD_DIM
        scale = tl.rsqrt(variance + eps)[:, None]
        gain = tl.load(weight + places, mask=turns, other=0.0).to(tl.float32)
        shift = tl.load(bias + places, mask=turns, other=0.0).to(tl.float32)
        a = a * scale * gain + shift
        gain = tl.load(weight + places + HALF, mask=turns, other=0.0).to(tl.float32)
        shift = tl.load(bias + places + HALF, mask=turns, other=0.0).to(tl.float32)
        b = b * scale * gain + shift
    position = tl.load(positions + row).to(tl.int64)
    position = tl.minimum(tl.maximum(position, 0), table_rows - 1)  # those of padding rows
    cos = tl.load(table + position * HEAD_DIM + columns)[None, :]
    sin = tl.load(table + position * HEAD_DIM + HALF + columns)[None, :]
    first = tl.where(turns, a * cos - b * sin, first)
    second = tl.where(turns, b * cos + a * sin, second)

    is_query = (heads < NUM_HEADS)[:, None]
    target = out + row * out_stride + places
    tl.store(target, first.to(out.dtype.element_ty), mask=is_query)
    tl.store(target + HALF, second.to(out.dtype.element_ty), mask=is_query)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        start = (slot + layer_offset) * (NUM_KV_HEADS * HEAD_DIM)
        is_key = turns & (heads >= NUM_HEADS)[:, None]
        target = keys + start + places - NUM_HEADS * HEAD_DIM
        tl.store(target, first.to(keys.dtype.element_ty), mask=is_key)
        tl.store(target + HALF, second.to(keys.dtype.element_ty), mask=is_key)
        is_value = exists & (heads >= NUM_NORMED)[:, None]
        target = values + start + places - NUM_NORMED * HEAD_DIM
        tl.store(target, first.to(values.dtype.element_ty), mask=is_value)
        tl.store(target + HALF, second.to(values.dtype.element_ty), mask=is_value)


def place_heads(
    qkv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    layer_offset: int = 0,
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> Tensor:
    """Queries [T, H, K], normed and turned; keys (the same) and values go to their slots.

    Args:
        qkv: [T, (H + 2G) K].
        weight, bias: [H + G, K] of the LayerNorms of query and key heads, or None.
        table: float32 [P, 2, K/2], `reference.rope_table`.
        positions: integers [T], each below P.
        slots: int32 [T]; -1 keeps a row from memory.
        keys, values: [num_slots, G, K], written at slot + layer_offset.

    Raises:
        ValueError: shapes that do not fit.
    """
    num_slots, num_kv_heads, head_dim = keys.shape
    num_rows = len(qkv)
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    check_head_dim(head_dim)
    if num_heads < 1:
        raise ValueError(f"qkv {list(qkv.shape)} has no query heads beside {num_kv_heads} kv heads")
    if out is None:
        out = torch.empty(num_rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    check_shape("qkv", qkv, (num_rows, (num_heads + 2 * num_kv_heads) * head_dim))
    check_shape("table", table, (-1, 2, head_dim // 2))
    check_shape("positions", positions, (num_rows,))
    check_shape("slots", slots, (num_rows,))
    check_shape("out", out, (num_rows, num_heads, head_dim))
    for name, memory in (("keys", keys), ("values", values)):
        check_shape(name, memory, (num_slots, num_kv_heads, head_dim))
        if not memory.is_contiguous():
            raise ValueError(f"{name} must be contiguous, has strides {memory.stride()}")
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias of the heads' LayerNorm come together")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_shape(name, tensor, (num_heads + num_kv_heads, head_dim))
            if not tensor.is_contiguous():
                raise ValueError(f"{name} must be contiguous, has strides {tensor.stride()}")
    if num_rows:
        tile = min(heads_for(head_dim), power_of_2(num_heads + 2 * num_kv_heads))
        _place_heads[(num_rows, ceil_div(num_heads + 2 * num_kv_heads, tile))](
            qkv,
            weight,
            bias,
            table,
            positions,
            slots,
            out,
            keys,
            values,
            qkv.stride(0),
            out.stride(0),
            len(table),
            layer_offset,
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            NORMED=weight is not None,
            TILE=tile,
            num_warps=1,
        )
    return out
