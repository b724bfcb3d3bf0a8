"""Rows times a matrix that is packed in tiles of 32 outputs, each one stretch of memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange, types
from numba.extending import overload, register_jitable
from numpy.typing import NDArray
from torch import Tensor

from momaserve.kernels.cpu.jit import kernel, threaded
from momaserve.kernels.cpu.tile import LANES, TILE, multiply_tile, widen_tile

Array = NDArray[Any]

_MANY_ROWS = 128
"""Rows from which it pays to widen a tile of bfloat16 once, instead of for every eight of them."""


def padded(size: int, multiple: int = TILE) -> int:
    """`size` rounded up."""
    return -(-size // multiple) * multiple


def pack(weight: Tensor) -> Array:
    """A matrix as the kernels read it, its outputs padded with zeros to whole tiles.

    Args:
        weight: [..., O, I], float32 or bfloat16. Float32 that is bfloat16 exactly, as that of a
            checkpoint of bfloat16 is, is packed as such.

    Returns:
        [..., N, I, 32] float32, or [..., N, I, 16] uint32: in the word j of a tile the bfloat16
        of output j is the lower half, that of output 16 + j the upper.
    """
    *outer, size, inputs = weight.shape
    num_tiles = padded(size) // TILE
    half = weight.to(torch.bfloat16)
    is_half = weight.dtype is torch.bfloat16 or torch.equal(half.to(weight.dtype), weight)
    source = half if is_half else weight
    wide = torch.zeros(*outer, padded(size), inputs, dtype=source.dtype)
    wide[..., :size, :] = source
    packed: Array
    if not is_half:
        packed = wide.view(*outer, num_tiles, TILE, inputs).mT.contiguous().numpy()
        return packed
    tiles = wide.view(*outer, num_tiles, 2, LANES, inputs).movedim(-3, -1)  # [..., N, 16, I, 2]
    words = tiles.transpose(-3, -2).contiguous().view(torch.int32).squeeze(-1)
    packed = words.numpy().view(np.uint32)
    return packed


def multiply_rows(
    x: Any, rows: Any, first: int, last: int, w: Any, base: int, out: Any, column: int
) -> None:
    """out[p, column : column + 32] = x[rows[p]] times one tile, for p from `first` to `last`.

    In kernels only.
    """
    raise NotImplementedError


# numba compares the names of arguments and their annotations.
@overload(multiply_rows)
def _multiply_rows(x, rows, first, last, w, base, out, column):  # type: ignore[no-untyped-def]
    if not isinstance(w.dtype, types.Integer):
        return lambda x, rows, first, last, w, base, out, column: _by_eights(
            x, rows, first, last, w, base, out, column
        )

    def maybe_widened(x, rows, first, last, w, base, out, column):  # type: ignore[no-untyped-def]
        if last - first < _MANY_ROWS:
            _by_eights(x, rows, first, last, w, base, out, column)
        else:
            wide = np.empty(x.shape[1] * TILE, np.float32)
            widen_tile(w, base, x.shape[1], wide)
            _by_eights(x, rows, first, last, wide, 0, out, column)

    return maybe_widened


@register_jitable
def _by_eights(
    x: Any, rows: Any, first: int, last: int, w: Any, base: int, out: Any, column: int
) -> None:
    size, width = x.shape[1], out.shape[1]
    p, o = first, first * width + column
    while p + 8 <= last:
        at = (
            rows[p] * size, rows[p + 1] * size, rows[p + 2] * size, rows[p + 3] * size,
            rows[p + 4] * size, rows[p + 5] * size, rows[p + 6] * size, rows[p + 7] * size,
        )  # fmt: skip
        to = (
            o, o + width, o + 2 * width, o + 3 * width,
            o + 4 * width, o + 5 * width, o + 6 * width, o + 7 * width,
        )  # fmt: skip
        multiply_tile(x, at, w, base, size, out, to)
        p, o = p + 8, o + 8 * width
    if p + 4 <= last:
        at4 = (rows[p] * size, rows[p + 1] * size, rows[p + 2] * size, rows[p + 3] * size)
        multiply_tile(x, at4, w, base, size, out, (o, o + width, o + 2 * width, o + 3 * width))
        p, o = p + 4, o + 4 * width
    if p + 2 <= last:
        at2 = (rows[p] * size, rows[p + 1] * size)
        multiply_tile(x, at2, w, base, size, out, (o, o + width))
        p, o = p + 2, o + 2 * width
    if p < last:
        multiply_tile(x, (rows[p] * size,), w, base, size, out, (o,))


def _linear(x: Any, rows: Any, w: Any, out: Any) -> None:
    """out [R, 32 N] = x [T, I] at rows int64 [R], times w [N, I, ..].

    x and out are float32 and C-contiguous. The matrix is read from memory once, whatever R is.
    """
    step = w.shape[1] * w.shape[2]
    for tile in prange(w.shape[0]):
        multiply_rows(x, rows, 0, len(rows), w, tile * step, out, tile * TILE)


linear = kernel(_linear)
linear_threaded = threaded(_linear)
