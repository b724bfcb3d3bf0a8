"""Attention of single rows straight over the blocks that hold their K/V; nothing is copied."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from momaserve.kernels.cpu.jit import kernel, threaded
from momaserve.kernels.cpu.scalar import exp32, widen

_MINUS_INFINITY = np.float32(-np.inf)


def _attend(
    q: Any,
    keys: Any,
    values: Any,
    rows: Any,
    positions: Any,
    tables: Any,
    block_size: int,
    taken: Any,
    out: Any,
) -> None:
    """Causal attention over the sequence of each row.

    Args:
        q: [T, at least H K], queries of the first H K columns.
        keys, values: [slots, G, K].
        rows: int64 [R, 2], the rows to compute, and for each the row of `tables` that has the
            blocks of its sequence.
        positions: int64 [T]; a row sees positions 0 to its own.
        tables: int32 [S, blocks], ids of blocks.
        taken: bool [slots]: keys that a depth-routed layer took; a row sees those and itself. An
            empty array: all of them.
        out: [T, H K], written at the rows.
    """
    num_kv_heads, head_dim = keys.shape[1:]
    num_heads = out.shape[1] // head_dim
    per_kv = num_heads // num_kv_heads
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    for r in prange(rows.shape[0]):
        t, sequence = rows[r, 0], rows[r, 1]
        length = positions[t] + 1
        scores = np.empty((num_heads, length), np.float32)
        for s in range(length):
            slot = tables[sequence, s // block_size] * block_size + s % block_size
            if len(taken) and not taken[slot] and s != length - 1:
                for h in range(num_heads):
                    scores[h, s] = _MINUS_INFINITY
                continue
            for h in range(num_heads):
                g, first = h // per_kv, h * head_dim
                total = np.float32(0)
                for i in range(head_dim):
                    total += q[t, first + i] * widen(keys[slot, g, i])
                scores[h, s] = total * scale
        for h in range(num_heads):
            best = scores[h, 0]
            for s in range(1, length):
                best = max(best, scores[h, s])
            total = np.float32(0)
            for s in range(length):
                weight = exp32(scores[h, s] - best)
                scores[h, s] = weight if scores[h, s] > _MINUS_INFINITY else np.float32(0)
                total += scores[h, s]
            for s in range(length):
                scores[h, s] /= total
        for column in range(out.shape[1]):
            out[t, column] = np.float32(0)
        for s in range(length):
            slot = tables[sequence, s // block_size] * block_size + s % block_size
            if len(taken) and not taken[slot] and s != length - 1:
                continue
            for h in range(num_heads):
                g, first = h // per_kv, h * head_dim
                weight = scores[h, s]
                for i in range(head_dim):
                    out[t, first + i] += weight * widen(values[slot, g, i])


attend = kernel(_attend)
attend_threaded = threaded(_attend)
