"""Rows times a matrix, in tiles of four rows and four outputs that stay in registers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from momaserve.kernels.cpu.jit import kernel, threaded
from momaserve.kernels.cpu.scalar import widen

TILE = 4
"""Outputs of a tile; a matrix has a multiple of it."""


def _linear(x: Any, w: Any, out: Any) -> None:
    """out [T, O] = x [T, I] @ w [O, I]^T. x and out are float32; w as in `scalar.widen`.

    The matrix is read once, whatever T is.
    """
    num_rows, num_inputs = x.shape
    for tile in prange(w.shape[0] // TILE):
        o = TILE * tile
        t = 0
        while t + 4 <= num_rows:
            a00 = a01 = a02 = a03 = np.float32(0)
            a10 = a11 = a12 = a13 = np.float32(0)
            a20 = a21 = a22 = a23 = np.float32(0)
            a30 = a31 = a32 = a33 = np.float32(0)
            for i in range(num_inputs):
                w0, w1 = widen(w[o, i]), widen(w[o + 1, i])
                w2, w3 = widen(w[o + 2, i]), widen(w[o + 3, i])
                x0, x1, x2, x3 = x[t, i], x[t + 1, i], x[t + 2, i], x[t + 3, i]
                a00 += w0 * x0
                a01 += w1 * x0
                a02 += w2 * x0
                a03 += w3 * x0
                a10 += w0 * x1
                a11 += w1 * x1
                a12 += w2 * x1
                a13 += w3 * x1
                a20 += w0 * x2
                a21 += w1 * x2
                a22 += w2 * x2
                a23 += w3 * x2
                a30 += w0 * x3
                a31 += w1 * x3
                a32 += w2 * x3
                a33 += w3 * x3
            out[t, o], out[t, o + 1], out[t, o + 2], out[t, o + 3] = a00, a01, a02, a03
            out[t + 1, o], out[t + 1, o + 1], out[t + 1, o + 2], out[t + 1, o + 3] = (
                a10,
                a11,
                a12,
                a13,
            )
            out[t + 2, o], out[t + 2, o + 1], out[t + 2, o + 2], out[t + 2, o + 3] = (
                a20,
                a21,
                a22,
                a23,
            )
            out[t + 3, o], out[t + 3, o + 1], out[t + 3, o + 2], out[t + 3, o + 3] = (
                a30,
                a31,
                a32,
                a33,
            )
            t += 4
        while t < num_rows:
            b0 = b1 = b2 = b3 = np.float32(0)
            for i in range(num_inputs):
                xi = x[t, i]
                b0 += widen(w[o, i]) * xi
                b1 += widen(w[o + 1, i]) * xi
                b2 += widen(w[o + 2, i]) * xi
                b3 += widen(w[o + 3, i]) * xi
            out[t, o], out[t, o + 1], out[t, o + 2], out[t, o + 3] = b0, b1, b2, b3
            t += 1


linear = kernel(_linear)
linear_threaded = threaded(_linear)
