"""What lies between matrices: embedding, norms, rotary angles, residuals."""

from __future__ import annotations

from typing import Any

import numpy as np

from momaserve.kernels.cpu.jit import kernel
from momaserve.kernels.cpu.scalar import widen

LAYER_NORM_EPS = np.float32(1e-5)


@kernel
def embed(token_ids: Any, table: Any, out: Any) -> None:
    """out [T, D] = table [V, D] at token_ids int64 [T]."""
    for t in range(len(token_ids)):
        row = token_ids[t]
        for i in range(table.shape[1]):
            out[t, i] = widen(table[row, i])


@kernel
def add(x: Any, y: Any, out: Any) -> None:
    """out = x + y of the first D columns; out may be x."""
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            out[t, i] = x[t, i] + y[t, i]


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
    """out = x + rms_norm(y of the first D columns), the post-norm residual; out may be x."""
    num_rows, width = x.shape
    for t in range(num_rows):
        total = np.float32(0)
        for i in range(width):
            total += y[t, i] * y[t, i]
        scale = np.float32(1) / np.sqrt(total / np.float32(width) + eps)
        for i in range(width):
            out[t, i] = x[t, i] + y[t, i] * scale * weight[i]


@kernel
def blend(x: Any, rows: Any, y: Any, weight: Any) -> None:
    """x += weight * (y - x) at the rows: a depth-routed layer, in place.

    x is [T, D], rows int64 [R], y [R, D], weight float32 [R]; a weight of 1 takes y itself.
    """
    for r in range(len(rows)):
        t = rows[r]
        if weight[r] == np.float32(1):
            for i in range(x.shape[1]):
                x[t, i] = y[r, i]
        else:
            for i in range(x.shape[1]):
                x[t, i] += weight[r] * (y[r, i] - x[t, i])


@kernel
def norm_heads(qkv: Any, weight: Any, bias: Any, head_dim: int) -> None:
    """LayerNorm of each of the first heads of qkv [T, (H + 2G) K or more], in place.

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
    """Rotate-half RoPE of the first `num_heads` heads of qkv [T, (H + 2G) K or more], in place.

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
