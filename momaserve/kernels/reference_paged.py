"""Attention over paged KV memory, and what goes into it, in plain torch.

Twins of `triton.attention` and `triton.heads`, with their signatures; shapes and meanings stand
there. They look at lengths on the host and go through sequences one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momaserve.kernels import reference


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
    """Queries [T, H, K], normed and turned; keys (the same) and values go to their slots."""
    _, num_kv_heads, head_dim = keys.shape
    rows = qkv.view(len(qkv), -1, head_dim)
    num_heads = rows.shape[1] - 2 * num_kv_heads
    turned = rows[:, : num_heads + num_kv_heads].float()
    if weight is not None and bias is not None:
        turned = reference.head_layer_norm(turned, weight, bias, eps)
    places = positions.long().clamp(0, len(table) - 1)
    turned = reference.apply_rope(turned, table[places])
    kept = slots >= 0
    target = slots[kept].long() + layer_offset
    keys[target] = turned[kept, num_heads:].to(keys.dtype)
    values[target] = rows[kept, num_heads + num_kv_heads :].to(values.dtype)
    queries = turned[:, :num_heads].to(qkv.dtype)
    return queries if out is None else out.copy_(queries)


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
) -> Tensor:
    """Attention of every row over the positions up to its own: [T, H, K]."""
    out = torch.empty_like(q) if out is None else out
    out.zero_()
    starts: list[int] = cu_seqlens_q.tolist()
    for sequence, length in enumerate(seq_lens.tolist()):
        start, end = starts[sequence], starts[sequence + 1]
        if start == end:
            continue
        if end - start > max_q or length > max_len:
            raise ValueError(f"{end - start} rows of {length}, more than {max_q} of {max_len}")
        positions = torch.arange(length, device=q.device)
        blocks = block_tables[sequence, positions // block_size].long()
        if index is None:
            slots = blocks * block_stride + layer_offset + positions % block_size
        else:
            slots = index[blocks * block_size + positions % block_size].long()
            positions, slots = positions[slots >= 0], slots[slots >= 0]
        ends = torch.arange(length - (end - start), length, device=q.device)
        mask = positions <= ends.unsqueeze(1)
        sees = mask.any(1)
        out[start:end][sees] = reference.attend(
            q[start:end][sees].float().unsqueeze(0),
            keys[slots].float().unsqueeze(0),
            values[slots].float().unsqueeze(0),
            mask[sees],
        )[0].to(q.dtype)
    return out
