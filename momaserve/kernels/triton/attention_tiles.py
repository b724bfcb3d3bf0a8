"""How attention is cut into programs: pure functions of shapes over two tables of sizes.

Decoding lives on bytes in flight: an H200 streams at its full rate with about 40 KiB asked for per
multiprocessor. A decoding program is one warp, so that it never waits for others; registers let a
multiprocessor hold `resident` of them, each with two tiles of K and V on their way. (The compiler
halves its stages between looking up a block and loading from it: five stages are two tiles ahead.)
A prompt's tile is what matrix units and registers hold without spilling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from momaserve.kernels.triton.jit import ceil_div, power_of_2

Sizes = TypeVar("Sizes")

STATISTICS = 4
"""Numbers behind each part of a row: its height, and what keeps rows aligned to 16 bytes."""
MIN_SHARE = 64
"""Positions that are worth a decoding program of their own."""
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Sizes of one launch."""

    rows: int
    """Rows of a tile of queries: of all heads that share a kv head."""
    positions: int
    """Positions of a tile of keys and values."""
    warps: int
    stages: int
    resident: int = 1
    """Programs that a multiprocessor holds at once."""

    @property
    def min_tiles(self) -> int:
        """Tiles of positions that are worth a decoding program of their own."""
        return ceil_div(MIN_SHARE, self.positions)


DECODE: dict[int, Tiles] = {
    128: Tiles(rows=16, positions=16, warps=1, stages=5, resident=16),
    256: Tiles(rows=16, positions=16, warps=1, stages=5, resident=8),
    512: Tiles(rows=16, positions=16, warps=1, stages=3, resident=4),
}
"""By the most bytes that one head has at one position."""

PREFILL: dict[int, tuple[Tiles, ...]] = {
    128: (
        Tiles(rows=64, positions=64, warps=4, stages=3),
        Tiles(rows=128, positions=64, warps=8, stages=2),  # 128 registers, so two programs
    ),
    256: (
        Tiles(rows=64, positions=32, warps=4, stages=3),
        Tiles(rows=128, positions=64, warps=8, stages=3),
    ),
}
"""The same, for few rows and for many; the rows of the first are the most."""

PREFILL_FLOAT32: dict[int, tuple[Tiles, ...]] = {
    256: (Tiles(rows=32, positions=32, warps=4, stages=2),),
    512: (Tiles(rows=16, positions=32, warps=4, stages=2),),
}
"""Three products for one, from twice the registers."""


def decode_tiles(shared: int, head_dim: int, itemsize: int) -> Tiles:
    """For one row per sequence.

    Args:
        shared: query heads per kv head.
        itemsize: bytes of a number.
    """
    tiles = _of(DECODE, head_dim * itemsize)
    return replace(tiles, rows=max(tiles.rows, power_of_2(shared)))


def prefill_tiles(max_q: int, shared: int, head_dim: int, itemsize: int) -> Tiles:
    """For up to `max_q` rows per sequence; arguments as above."""
    sizes = _of(PREFILL if itemsize <= 2 else PREFILL_FLOAT32, head_dim * itemsize)
    wanted = power_of_2(max_q * shared)
    tiles = next((t for t in sizes if t.rows >= wanted), sizes[-1])
    return replace(tiles, rows=max(16, power_of_2(shared), min(tiles.rows, wanted)))


def num_splits(
    batch: int, num_kv_heads: int, max_len: int, num_multiprocessors: int, tiles: Tiles
) -> int:
    """Programs that share the positions of one sequence and kv head in a decoding step.

    The fewest that keep the device nearly as busy as the best number would: a last wave of few
    programs costs as much as a full one.
    """
    most = max(1, min(MAX_SPLITS, max_len // MIN_SHARE))
    room = num_multiprocessors * tiles.resident

    def use(splits: int) -> float:
        programs = batch * num_kv_heads * splits
        return programs / (ceil_div(programs, room) * room)

    uses = [use(splits) for splits in range(1, most + 1)]
    return next(n for n, share in enumerate(uses, start=1) if share >= 0.85 * max(uses))


def scratch_shape(
    splits: int, batch: int, num_heads: int, head_dim: int
) -> tuple[int, int, int, int]:
    """Of the float32 memory in which the splits leave their parts."""
    return (splits, batch, num_heads, head_dim + STATISTICS)


def _of(table: dict[int, Sizes], row_bytes: int) -> Sizes:
    return next(sizes for limit, sizes in table.items() if limit >= row_bytes)
