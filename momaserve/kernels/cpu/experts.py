"""Routed experts over the (token, expert) pairs that exist; what no token wants is not read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from momaserve.kernels.cpu.jit import kernel, threaded
from momaserve.kernels.cpu.linear import Array, multiply_rows, pack, padded
from momaserve.kernels.cpu.scalar import sigmoid
from momaserve.kernels.cpu.tile import LANES, TILE


def pack_gate_up(gate: Tensor, up: Tensor) -> Array:
    """gate, up [E, F, D] packed together: a tile has 16 outputs of one, then those of the other."""
    num_experts, inner, size = gate.shape
    both = torch.zeros(num_experts, padded(inner, LANES), 2, size, dtype=gate.dtype)
    both[:, :inner, 0], both[:, :inner, 1] = gate, up
    tiles = both.view(num_experts, -1, LANES, 2, size).transpose(2, 3)  # [E, N, 2, 16, D]
    return pack(tiles.reshape(num_experts, -1, size))


def pack_down(down: Tensor) -> Array:
    """down [E, D, F], its inputs padded as the outputs of `pack_gate_up` are."""
    inner = down.shape[2]
    return pack(torch.nn.functional.pad(down, (0, padded(inner, LANES) - inner)))


@kernel
def list_pairs(rows: Any, selected: Any, weights: Any, tokens: Any, scale: Any, starts: Any) -> int:
    """Lists the selected (token, expert) pairs by expert; returns how many there are.

    Args:
        rows: int64 [R], tokens; selected: bool [R, E]; weights: float32 [R, E].
        tokens, scale: int64 and float32 [R E], written: token and weight of each pair.
        starts: int64 [E + 1], written: first pair of each expert.
    """
    num_rows, num_experts = selected.shape
    count = 0
    for e in range(num_experts):
        starts[e] = count
        for r in range(num_rows):
            if selected[r, e]:
                tokens[count], scale[count] = rows[r], weights[r, e]
                count += 1
    starts[num_experts] = count
    return count


def _multiply(x: Any, rows: Any, starts: Any, w: Any, out: Any) -> None:
    """out [P, 32 N] at the pairs of each expert = x [., I] at rows int64 [P], times its matrix.

    w is [E, N, I, ..]; an expert without pairs is not read.
    """
    num_experts, num_tiles = w.shape[:2]
    step = w.shape[2] * w.shape[3]
    for work in prange(num_tiles * num_experts):  # each thread has a share of every expert
        tile, e = work // num_experts, work % num_experts
        base = (e * num_tiles + tile) * step
        multiply_rows(x, rows, starts[e], starts[e + 1], w, base, out, tile * TILE)


def _multiply_gated(x: Any, rows: Any, starts: Any, w: Any, both: Any, hidden: Any) -> None:
    """hidden [P, 16 N] = silu(gate) * up, of products as in `_multiply`.

    w is packed by `pack_gate_up`; both [P, 32 N] is written with gate and up as they lie there.
    """
    num_experts, num_tiles = w.shape[:2]
    step = w.shape[2] * w.shape[3]
    for work in prange(num_tiles * num_experts):  # each thread has a share of every expert
        tile, e = work // num_experts, work % num_experts
        base = (e * num_tiles + tile) * step
        multiply_rows(x, rows, starts[e], starts[e + 1], w, base, both, tile * TILE)
        for p in range(starts[e], starts[e + 1]):
            pair, made = both[p, tile * TILE :], hidden[p, tile * LANES :]
            for j in range(LANES):
                made[j] = pair[j] * sigmoid(pair[j]) * pair[LANES + j]


multiply, multiply_threaded = kernel(_multiply), threaded(_multiply)
multiply_gated, multiply_gated_threaded = kernel(_multiply_gated), threaded(_multiply_gated)


@kernel
def routed_experts(
    u: Any, rows: Any, selected: Any, weights: Any, gate_up: Any, down: Any, threads: bool, out: Any
) -> None:
    """out [T, D] += weighted sum of SwiGLU experts of one group, over its selected pairs.

    Args:
        u: [T, D] what the experts read.
        rows: int64 [R], the tokens of the group.
        selected: bool [R, E]; weights: float32 [R, E].
        gate_up, down: packed by `pack_gate_up` and `pack_down`.
        threads: whether several threads share the work.
    """
    num_rows, num_experts = selected.shape
    tokens = np.empty(num_rows * num_experts, np.int64)
    scale = np.empty(num_rows * num_experts, np.float32)
    starts = np.empty(num_experts + 1, np.int64)
    count = list_pairs(rows, selected, weights, tokens, scale, starts)
    if count == 0:
        return
    both = np.empty((count, gate_up.shape[1] * TILE), np.float32)
    hidden = np.empty((count, gate_up.shape[1] * LANES), np.float32)
    y = np.empty((count, down.shape[1] * TILE), np.float32)
    pairs = np.arange(count)
    if threads:
        multiply_gated_threaded(u, tokens[:count], starts, gate_up, both, hidden)
        multiply_threaded(hidden, pairs, starts, down, y)
    else:
        multiply_gated(u, tokens[:count], starts, gate_up, both, hidden)
        multiply(hidden, pairs, starts, down, y)
    for p in range(count):
        for i in range(out.shape[1]):
            out[tokens[p], i] += scale[p] * y[p, i]
