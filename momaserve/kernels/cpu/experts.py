"""Routed experts over the (token, expert) pairs that exist; what no token wants is not read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from momaserve.kernels.cpu.jit import kernel, threaded
from momaserve.kernels.cpu.linear import TILE
from momaserve.kernels.cpu.scalar import sigmoid, widen


def _gate_up(u: Any, tokens: Any, gate: Any, up: Any, hidden: Any) -> None:
    """hidden [P, F] = silu(u gate^T) * (u up^T) of one expert.

    u is [T, D], tokens int64 [P] its rows, gate and up [F, D].
    """
    num_inputs = u.shape[1]
    num_pairs = len(tokens)
    for tile in prange(gate.shape[0] // 2):
        f = 2 * tile
        p = 0
        while p + 4 <= num_pairs:
            t0, t1, t2, t3 = tokens[p], tokens[p + 1], tokens[p + 2], tokens[p + 3]
            g00 = g01 = g10 = g11 = g20 = g21 = g30 = g31 = np.float32(0)
            h00 = h01 = h10 = h11 = h20 = h21 = h30 = h31 = np.float32(0)
            for i in range(num_inputs):
                gate0, gate1 = widen(gate[f, i]), widen(gate[f + 1, i])
                up0, up1 = widen(up[f, i]), widen(up[f + 1, i])
                x0, x1, x2, x3 = u[t0, i], u[t1, i], u[t2, i], u[t3, i]
                g00 += gate0 * x0
                g01 += gate1 * x0
                h00 += up0 * x0
                h01 += up1 * x0
                g10 += gate0 * x1
                g11 += gate1 * x1
                h10 += up0 * x1
                h11 += up1 * x1
                g20 += gate0 * x2
                g21 += gate1 * x2
                h20 += up0 * x2
                h21 += up1 * x2
                g30 += gate0 * x3
                g31 += gate1 * x3
                h30 += up0 * x3
                h31 += up1 * x3
            hidden[p, f], hidden[p, f + 1] = g00 * sigmoid(g00) * h00, g01 * sigmoid(g01) * h01
            hidden[p + 1, f] = g10 * sigmoid(g10) * h10
            hidden[p + 1, f + 1] = g11 * sigmoid(g11) * h11
            hidden[p + 2, f] = g20 * sigmoid(g20) * h20
            hidden[p + 2, f + 1] = g21 * sigmoid(g21) * h21
            hidden[p + 3, f] = g30 * sigmoid(g30) * h30
            hidden[p + 3, f + 1] = g31 * sigmoid(g31) * h31
            p += 4
        while p < num_pairs:
            t0 = tokens[p]
            g00 = g01 = h00 = h01 = np.float32(0)
            for i in range(num_inputs):
                x0 = u[t0, i]
                g00 += widen(gate[f, i]) * x0
                g01 += widen(gate[f + 1, i]) * x0
                h00 += widen(up[f, i]) * x0
                h01 += widen(up[f + 1, i]) * x0
            hidden[p, f], hidden[p, f + 1] = g00 * sigmoid(g00) * h00, g01 * sigmoid(g01) * h01
            p += 1


def _down(hidden: Any, tokens: Any, scale: Any, down: Any, out: Any) -> None:
    """out [T, D] at `tokens` += scale [P] * (hidden [P, F] @ down [D, F]^T), of one expert."""
    num_inputs = hidden.shape[1]
    num_pairs = len(tokens)
    for tile in prange(down.shape[0] // TILE):
        o = TILE * tile
        p = 0
        while p + 2 <= num_pairs:
            a00 = a01 = a02 = a03 = np.float32(0)
            a10 = a11 = a12 = a13 = np.float32(0)
            for i in range(num_inputs):
                w0, w1 = widen(down[o, i]), widen(down[o + 1, i])
                w2, w3 = widen(down[o + 2, i]), widen(down[o + 3, i])
                x0, x1 = hidden[p, i], hidden[p + 1, i]
                a00 += w0 * x0
                a01 += w1 * x0
                a02 += w2 * x0
                a03 += w3 * x0
                a10 += w0 * x1
                a11 += w1 * x1
                a12 += w2 * x1
                a13 += w3 * x1
            t0, t1, s0, s1 = tokens[p], tokens[p + 1], scale[p], scale[p + 1]
            out[t0, o] += s0 * a00
            out[t0, o + 1] += s0 * a01
            out[t0, o + 2] += s0 * a02
            out[t0, o + 3] += s0 * a03
            out[t1, o] += s1 * a10
            out[t1, o + 1] += s1 * a11
            out[t1, o + 2] += s1 * a12
            out[t1, o + 3] += s1 * a13
            p += 2
        while p < num_pairs:
            a00 = a01 = a02 = a03 = np.float32(0)
            for i in range(num_inputs):
                x0 = hidden[p, i]
                a00 += widen(down[o, i]) * x0
                a01 += widen(down[o + 1, i]) * x0
                a02 += widen(down[o + 2, i]) * x0
                a03 += widen(down[o + 3, i]) * x0
            t0, s0 = tokens[p], scale[p]
            out[t0, o] += s0 * a00
            out[t0, o + 1] += s0 * a01
            out[t0, o + 2] += s0 * a02
            out[t0, o + 3] += s0 * a03
            p += 1


gate_up, gate_up_threaded = kernel(_gate_up), threaded(_gate_up)
down, down_threaded = kernel(_down), threaded(_down)


@kernel
def routed_experts(
    u: Any, rows: Any, selected: Any, weights: Any, gate: Any, up: Any, down_proj: Any, out: Any
) -> None:
    """out [T, D] += the selected experts of one group; the whole group in one call.

    Args:
        u: [T, D] what the experts read.
        rows: int64 [R], the tokens of the group.
        selected: bool [R, E]; weights: float32 [R, E].
        gate, up: [E, F, D]; down_proj: [E, D, F].
    """
    num_rows, num_experts = selected.shape
    tokens = np.empty(num_rows, np.int64)
    scale = np.empty(num_rows, np.float32)
    hidden = np.empty((num_rows, gate.shape[1]), np.float32)
    for e in range(num_experts):
        count = 0
        for r in range(num_rows):
            if selected[r, e]:
                tokens[count], scale[count] = rows[r], weights[r, e]
                count += 1
        if count:
            gate_up(u, tokens[:count], gate[e], up[e], hidden[:count])
            down(hidden[:count], tokens[:count], scale[:count], down_proj[e], out)
