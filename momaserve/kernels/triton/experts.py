"""SwiGLU experts over (token, expert) pairs that `routing` sorted; unused experts are not read.

Which expert a program works for is found on the device from `offsets`, and programs beyond the
last pair leave at once. Two ways:

* directly, for the few rows of small decode steps: no matrix instructions; weights stream past one
  pair at a time, and the second launch adds a row's pairs in the order of experts. Programs that
  need the same weights follow each other, so those come from memory once.
* grouped: tiles of an expert's pairs times tiles of its outputs, weights read once per row tile;
  gate and up in one launch with SwiGLU, then down, weighted, into a scratch of one row per pair and
  share of the sum; a third launch adds a row's pairs and shares in order.

Nothing is added by atomics, so results repeat bit by bit. u and the weights have one number format
(bf16, fp16, fp32); sums are float32. u has contiguous rows, u_stride its row stride in elements.
Rows without expert, padding rows among them, get zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from momaserve.kernels.reference_experts import ExpertWeights
from momaserve.kernels.reference_routing import Pairs
from momaserve.kernels.triton import experts_kernels
from momaserve.kernels.triton.jit import ceil_div, power_of_2

DIRECT_ROWS = 4
"""Steps of at most this many rows go the direct way."""


@dataclass(frozen=True, slots=True)
class DirectTiles:
    """How the direct way is cut: outputs of a program, and inputs it holds at once."""

    up_outputs: int
    up_depth: int
    up_warps: int
    down_outputs: int
    down_depth: int
    down_warps: int


@dataclass(frozen=True, slots=True)
class GroupedTiles:
    """How the grouped way is cut."""

    rows: int
    """Pairs of a program, in both launches."""
    up_outputs: int
    """Outputs of gate, and as many of up."""
    up_depth: int
    up_warps: int
    up_stages: int
    down_outputs: int
    down_depth: int
    down_warps: int
    down_stages: int
    shares: int
    """Programs that share one sum over F."""


DIRECT_TILES: tuple[tuple[int, DirectTiles], ...] = (
    (DIRECT_ROWS, DirectTiles(4, 1024, 4, 2, 2048, 4)),
)
GROUPED_TILES: tuple[tuple[int, GroupedTiles], ...] = (
    (16, GroupedTiles(16, 32, 128, 4, 4, 32, 128, 4, 4, 4)),
    (64, GroupedTiles(16, 32, 128, 4, 4, 32, 128, 4, 4, 2)),
    (128, GroupedTiles(32, 64, 128, 4, 3, 64, 128, 4, 4, 2)),
    (512, GroupedTiles(64, 64, 64, 4, 4, 128, 64, 4, 4, 1)),
    (1 << 30, GroupedTiles(128, 64, 32, 8, 4, 128, 64, 8, 3, 1)),
)
"""By the most rows of a step that they are for."""


def use_direct(num_rows: int) -> bool:
    return num_rows <= DIRECT_ROWS


def direct_tiles_for(num_rows: int) -> DirectTiles:
    return next(tiles for most, tiles in DIRECT_TILES if num_rows <= most)


def grouped_tiles_for(num_rows: int) -> GroupedTiles:
    return next(tiles for most, tiles in GROUPED_TILES if num_rows <= most)


def experts(
    u: Tensor,
    pairs: Pairs,
    weights: ExpertWeights,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """As `reference_experts.experts`; nothing waits for the device.

    Raises:
        ValueError: shapes or number formats that do not fit together.
    """
    _check(u, pairs, weights, out)
    num_rows = len(u)
    if out is None:
        out = u.new_empty(u.shape, dtype=torch.float32)
        accumulate = False
    if not num_rows:
        return out
    if use_direct(num_rows):
        return direct(u, pairs, weights, direct_tiles_for(num_rows), out, accumulate)
    return grouped(u, pairs, weights, grouped_tiles_for(num_rows), out, accumulate)


def direct(
    u: Tensor,
    pairs: Pairs,
    weights: ExpertWeights,
    tiles: DirectTiles,
    out: Tensor,
    accumulate: bool,
) -> Tensor:
    """The way of few rows, T >= 1: two launches."""
    num_rows, width = u.shape
    num_experts, stride, _ = weights.gate.shape
    num_pairs = len(pairs.tokens)
    offsets = pairs.offsets[weights.first :]
    places = pairs.places[:, weights.first :]
    hidden = u.new_empty(num_pairs, stride)
    experts_kernels.direct_gate_up[(num_pairs * ceil_div(stride, tiles.up_outputs),)](
        u,
        weights.gate,
        weights.up,
        hidden,
        pairs.tokens,
        offsets,
        u.stride(0),
        WIDTH=width,
        INNER=weights.inner,
        STRIDE=stride,
        E=num_experts,
        E_PAD=power_of_2(num_experts),
        BLOCK_F=tiles.up_outputs,
        BLOCK_D=min(tiles.up_depth, power_of_2(width)),
        num_warps=tiles.up_warps,
    )
    experts_kernels.direct_down[(num_rows, ceil_div(width, tiles.down_outputs))](
        hidden,
        weights.down,
        pairs.weights,
        places,
        out,
        places.stride(0),
        WIDTH=width,
        STRIDE=stride,
        E=num_experts,
        E_PAD=power_of_2(num_experts),
        BLOCK_D=tiles.down_outputs,
        BLOCK_F=min(tiles.down_depth, power_of_2(stride)),
        ACCUMULATE=accumulate,
        num_warps=tiles.down_warps,
    )
    return out


def grouped(
    u: Tensor,
    pairs: Pairs,
    weights: ExpertWeights,
    tiles: GroupedTiles,
    out: Tensor,
    accumulate: bool,
) -> Tensor:
    """The way of many rows, T >= 1: three launches."""
    num_rows, width = u.shape
    num_experts, stride, _ = weights.gate.shape
    num_pairs = len(pairs.tokens)
    offsets = pairs.offsets[weights.first :]
    places = pairs.places[:, weights.first :]
    scale = max(1, u.element_size() // 2)  # float32 takes twice the room
    most_tiles = most_row_tiles(num_pairs, num_experts, tiles.rows)
    hidden = u.new_empty(num_pairs, stride)
    sums = u.new_empty(tiles.shares, num_pairs, width, dtype=torch.float32)
    experts_kernels.grouped_gate_up[(most_tiles * ceil_div(stride, tiles.up_outputs),)](
        u,
        weights.gate,
        weights.up,
        hidden,
        pairs.tokens,
        offsets,
        u.stride(0),
        WIDTH=width,
        INNER=weights.inner,
        STRIDE=stride,
        E=num_experts,
        E_PAD=power_of_2(num_experts),
        BLOCK_P=tiles.rows,
        BLOCK_F=tiles.up_outputs,
        BLOCK_D=min(tiles.up_depth // scale, max(16, power_of_2(width))),
        num_warps=tiles.up_warps,
        num_stages=tiles.up_stages,
    )
    experts_kernels.grouped_down[
        (most_tiles * ceil_div(width, tiles.down_outputs) * tiles.shares,)
    ](
        hidden,
        weights.down,
        pairs.weights,
        sums,
        offsets,
        num_pairs,
        WIDTH=width,
        STRIDE=stride,
        E=num_experts,
        E_PAD=power_of_2(num_experts),
        BLOCK_P=tiles.rows,
        BLOCK_D=tiles.down_outputs,
        BLOCK_F=min(tiles.down_depth // scale, max(16, power_of_2(stride))),
        SHARES=tiles.shares,
        num_warps=tiles.down_warps,
        num_stages=tiles.down_stages,
    )
    block = min(512, power_of_2(width))
    experts_kernels.add_pairs[(num_rows, ceil_div(width, block))](
        sums,
        places,
        out,
        places.stride(0),
        num_pairs,
        WIDTH=width,
        E=num_experts,
        E_PAD=power_of_2(num_experts),
        SHARES=tiles.shares,
        BLOCK_D=block,
        ACCUMULATE=accumulate,
        num_warps=4,
    )
    return out


def most_row_tiles(num_pairs: int, num_experts: int, rows: int) -> int:
    """Most tiles that P pairs can fill: each expert's last tile may be nearly empty."""
    return min(num_pairs, num_pairs // rows + num_experts)


def _check(u: Tensor, pairs: Pairs, weights: ExpertWeights, out: Tensor | None) -> None:
    num_experts, stride, width = weights.gate.shape
    shapes = {
        "u": (u, (len(u), width)),
        "up": (weights.up, (num_experts, stride, width)),
        "down": (weights.down, (num_experts, width, stride)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape or tensor.dtype != weights.gate.dtype:
            raise ValueError(
                f"{name} must be {weights.gate.dtype} {list(shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    if u.stride(1) != 1:
        raise ValueError(f"rows of u must be contiguous, got strides {u.stride()}")
    for name in ("gate", "up", "down"):
        if not getattr(weights, name).is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    last = weights.first + num_experts
    if pairs.places.shape[0] != len(u) or last > pairs.places.shape[1]:
        raise ValueError(
            f"places {list(pairs.places.shape)} do not hold {len(u)} rows and experts "
            f"{weights.first} to {last}"
        )
    if out is not None and (
        out.shape != u.shape or out.dtype != torch.float32 or not out.is_contiguous()
    ):
        raise ValueError(
            f"out must be contiguous float32 {list(u.shape)}, got {out.dtype} {list(out.shape)}"
        )
