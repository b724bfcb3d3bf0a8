"""What lies between matrices: embedding, norms, rotary angles, and K/V on their way to memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from momaserve.kernels.cpu.jit import kernel
from momaserve.kernels.cpu.scalar import narrow, widen

LAYER_NORM_EPS = np.float32(1e-5)


@kernel
def embed(token_ids: Any, table: Any, out: Any) -> None:
    """out [T, D] = table [V, D] at token_ids int64 [T]."""
    for t in range(len(token_ids)):
        row = token_ids[t]
        for i in range(table.shape[1]):
            out[t, i] = widen(table[row, i])


@kernel
def rms_norm(x: Any, weight: Any, eps: Any, out: Any) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight; all [T, D], weight float32 [D]."""
    num_rows, width = x.shape
    for t in range(num_rows):
        total = np.float32(0)
        for i in range(width):
            total += x[t, i] * x[t, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            out[t, i] = x[t, i] * scale * weight[i]


@kernel
def add_rms_norm(x: Any, y: Any, weight: Any, eps: Any, out: Any) -> None:
    """out = x + rms_norm(y), the post-norm residual; out may be x."""
    num_rows, width = x.shape
    for t in range(num_rows):
        total = np.float32(0)
        for i in range(width):
            total += y[t, i] * y[t, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            out[t, i] = x[t, i] + y[t, i] * scale * weight[i]


@kernel
def blend(x: Any, y: Any, taken: Any, weight: Any) -> None:
    """x += weight * (y - x) where taken, else as it is: a depth-routed layer, in place.

    x and y are [T, D], taken bool [T], weight float32 [T]; a weight of 1 takes y itself.
    """
    num_rows, width = x.shape
    for t in range(num_rows):
        if not taken[t]:
            continue
        if weight[t] == np.float32(1):
            for i in range(width):
                x[t, i] = y[t, i]
        else:
            for i in range(width):
                x[t, i] += weight[t] * (y[t, i] - x[t, i])


@kernel
def norm_heads(qkv: Any, weight: Any, bias: Any, head_dim: int) -> None:
    """LayerNorm of each of the first heads of qkv [T, (H + 2G) K], in place.

    weight and bias are float32 [H + G, K]: those of the query heads, then of the key heads.
    """
    for t in range(qkv.shape[0]):
        for h in range(weight.shape[0]):
            first = h * head_dim
            mean = np.float32(0)
            for i in range(head_dim):
                mean += qkv[t, first + i]
            mean /= np.float32(head_dim)
            variance = np.float32(0)
            for i in range(head_dim):
                centred = qkv[t, first + i] - mean
                variance += centred * centred
            scale = np.float32(1) / np.sqrt(variance / np.float32(head_dim) + LAYER_NORM_EPS)
            for i in range(head_dim):
                qkv[t, first + i] = (qkv[t, first + i] - mean) * scale * weight[h, i] + bias[h, i]


@kernel
def rotate(qkv: Any, table: Any, positions: Any, num_heads: int) -> None:
    """Rotate-half RoPE of the first `num_heads` heads of qkv [T, (H + 2G) K], in place.

    table is float32 [P, 2, K/2] (`reference.rope_table`), positions int64 [T].
    """
    half = table.shape[2]
    for t in range(qkv.shape[0]):
        position = positions[t]
        for h in range(num_heads):
            first = 2 * h * half
            for i in range(half):
                cos, sin = table[position, 0, i], table[position, 1, i]
                a, b = qkv[t, first + i], qkv[t, first + half + i]
                qkv[t, first + i] = a * cos - b * sin
                qkv[t, first + half + i] = b * cos + a * sin


@kernel
def store(qkv: Any, slots: Any, first: int, keys: Any, values: Any) -> None:
    """Writes K and V of each row to its slot, in the memory's number format.

    qkv is [T, (H + 2G) K] with the keys from column `first` on, slots int64 [T], keys and values
    [slots, G, K].
    """
    num_kv_heads, head_dim = keys.shape[1:]
    width = num_kv_heads * head_dim
    for t in range(len(slots)):
        slot = slots[t]
        for g in range(num_kv_heads):
            for i in range(head_dim):
                column = first + g * head_dim + i
                keys[slot, g, i] = narrow(qkv[t, column], keys)
                values[slot, g, i] = narrow(qkv[t, column + width], values)
