"""Routing of all expert groups of a layer: scores, selection and the sorted list of pairs.

Two launches up to 64 rows, three beyond. The first computes the main router's logits and what each
slice of the auxiliary router's hidden layer adds to its logits; a program whose rows all belong to
other groups leaves at once, so weights of a modality that does not occur are not read. The second
adds the slices in order, selects by the policy of each row and writes the pairs; where rows do not
fit into one program it only counts, and a third writes.

u is [T, D] in any float format with contiguous rows, u_stride its row stride in elements; all else
is contiguous. Products of 16-bit numbers are exact and sums are float32, so a stored 16-bit `fc1`
gives float32's scores. A padding row has modality -1: it is read, and selects nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momaserve.kernels.reference_routing import Pairs, RouterWeights
from momaserve.kernels.triton import routing_kernels
from momaserve.kernels.triton.jit import ceil_div, coarse, power_of_2

VECTOR_ROWS = 4
"""Steps of at most this many rows are computed row by row."""
ROW_DEPTH = 512
"""Columns that one row is multiplied by at once."""
LISTED_ROWS = 64
"""Rows that one program selects for, at most."""
_SUMMED = 8192
"""Partial sums that one program holds at once, about."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the first launch is cut."""

    rows: int
    """Rows of one program; 1 is without matrix instructions."""
    inner: int
    """Hidden units of the auxiliary router of one program."""
    depth: int
    """Columns of u per step, at 16 bits."""
    num_warps: int
    num_stages: int


TILES: tuple[tuple[int, Tiles], ...] = (
    (VECTOR_ROWS, Tiles(1, 4, 0, 4, 1)),
    (16, Tiles(16, 16, 128, 4, 4)),
    (64, Tiles(32, 32, 128, 4, 3)),
    (512, Tiles(64, 32, 64, 4, 4)),
    (1 << 30, Tiles(64, 64, 64, 4, 3)),
)
"""By the most rows that they are for."""


def tiles_for(num_rows: int) -> Tiles:
    return next(tiles for most, tiles in TILES if num_rows <= most)


@dataclass(frozen=True, slots=True)
class Scores:
    """What the first launch leaves for the second."""

    logits: Tensor
    """float32 [T, S], main logits by number within the row's group."""
    partials: Tensor
    """float32 [slices, T, S]: their sum over slices is the auxiliary logit."""


def route(
    u: Tensor,
    modality: Tensor,
    policy: Tensor,
    routers: RouterWeights,
    *,
    taken: Tensor | None = None,
    chosen: Tensor | None = None,
    out: Pairs | None = None,
) -> Pairs:
    """As `reference_routing.route`; nothing waits for the device.

    Raises:
        ValueError: shapes or number formats that do not fit together.
    """
    num_rows, num_experts = len(u), routers.num_experts
    if out is None:
        out = Pairs.empty(num_rows, num_experts, routers.max_group, u.device)
    if chosen is not None:
        check("chosen", chosen, (num_rows, num_experts), torch.bool)
        chosen = chosen.view(torch.int8)
    size = num_rows * routers.max_group
    check("out.tokens", out.tokens, (size,), torch.int32)
    check("out.weights", out.weights, (size,), torch.float32)
    check("out.offsets", out.offsets, (num_experts + 1,), torch.int32)
    check("out.places", out.places, (num_rows, num_experts), torch.int32)
    if not num_rows:
        out.offsets.zero_()
        return out
    found = scores(u, modality, policy, routers, taken=taken)
    rows = min(power_of_2(num_rows), LISTED_ROWS)
    num_tiles = ceil_div(num_rows, rows)
    padded = power_of_2(num_experts)
    flags = counts = None
    if num_tiles > 1:
        flags = u.new_empty(num_experts, num_rows, dtype=torch.float32)
        counts = u.new_empty(num_experts, num_tiles, dtype=torch.int32)
    num_slices = len(found.partials)
    routing_kernels.list_pairs[(num_tiles,)](
        modality,
        policy,
        None if taken is None else taken.view(torch.int8),
        chosen,
        routers.thresholds,
        routers.groups,
        found.logits,
        found.partials,
        flags,
        counts,
        out.tokens,
        out.weights,
        out.offsets,
        out.places,
        num_rows,
        num_slices,
        S=routers.max_group,
        E=num_experts,
        E_PAD=padded,
        BLOCK_T=rows,
        BLOCK_A=summed_slices(num_slices, padded * rows),
        IS_ALL=num_tiles == 1,
        num_warps=4 if padded * rows <= 128 else 8,
    )
    if num_tiles > 1:
        routing_kernels.write_pairs[(num_tiles,)](
            flags,
            counts,
            out.tokens,
            out.weights,
            out.offsets,
            out.places,
            num_rows,
            E=num_experts,
            E_PAD=padded,
            BLOCK_T=rows,
            TILES_PAD=coarse(num_tiles),
            num_warps=4,
        )
    return out


def depth_of(tiles: Tiles, width: int, *, is_narrow: bool) -> int:
    """Columns of u per step; float32 takes twice the room."""
    depth = tiles.depth if is_narrow else tiles.depth // 2
    return min(depth, max(16, power_of_2(width)))


def summed_slices(num_slices: int, size: int) -> int:
    """Slices that a program adds at once where each has `size` numbers."""
    return max(1, min(power_of_2(max(num_slices, 1)), _SUMMED // size))


def scores(
    u: Tensor,
    modality: Tensor,
    policy: Tensor,
    routers: RouterWeights,
    *,
    taken: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Scores:
    """The first launch, for T >= 1 rows. Entries of rows without router are left unset, and
    partial sums of rows that are not causal."""
    num_rows, width = u.shape
    num_routers, inner, _ = routers.fc1.shape
    num_experts, size = routers.num_experts, routers.max_group
    if u.stride(1) != 1:
        raise ValueError(f"rows of u must be contiguous, got strides {u.stride()}")
    check("modality", modality, (num_rows,), torch.int8)
    check("policy", policy, (num_rows,), torch.int8)
    if taken is not None:
        check("taken", taken, (num_rows,), torch.bool)
        taken = taken.view(torch.int8)
    check("main", routers.main, (num_experts, width), torch.float32)
    check("fc1", routers.fc1, (num_routers, inner, width), routers.fc1.dtype)
    check("fc2", routers.fc2, (num_experts, inner), torch.float32)
    check("thresholds", routers.thresholds, (num_experts,), torch.float32)
    check("groups", routers.groups, (len(routers.groups), 3), torch.int32)
    tiles = tiles_for(num_rows) if tiles is None else tiles
    num_slices = ceil_div(inner, tiles.inner)
    logits = u.new_empty(num_rows, size, dtype=torch.float32)
    partials = u.new_empty(num_slices, num_rows, size, dtype=torch.float32)
    pointers: tuple[Any, ...] = (
        u,
        modality,
        policy,
        taken,
        routers.groups,
        routers.main,
        routers.fc1,
        routers.fc2,
        logits,
        partials,
        u.stride(0),
        num_rows,
        num_slices,
    )
    options: dict[str, Any] = {
        "WIDTH": width,
        "INNER": inner,
        "S": size,
        "S_PAD": power_of_2(size),
        "BLOCK_A": tiles.inner,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    row_depth = min(ROW_DEPTH, power_of_2(width))
    if tiles.rows == 1:
        routing_kernels.score_rows[(num_slices + 1, num_rows)](
            *pointers, BLOCK_D=row_depth, **options
        )
        return Scores(logits, partials)
    is_narrow = u.dtype == routers.fc1.dtype and u.dtype.itemsize == 2
    grid = (num_routers * num_slices + tiles.rows, ceil_div(num_rows, tiles.rows))
    routing_kernels.score_tiles[grid](
        *pointers,
        num_routers,
        BLOCK_T=tiles.rows,
        BLOCK_D=depth_of(tiles, width, is_narrow=is_narrow),
        ROW_D=row_depth,
        IS_NARROW=is_narrow,
        # Three TF32 products hold a 16-bit u exactly; a float32 model gets float32 itself.
        PRECISION="ieee" if u.dtype == torch.float32 else "tf32x3",
        **options,
    )
    return Scores(logits, partials)


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuses what a kernel would misread: behind it lies unchecked pointer arithmetic.

    Raises:
        ValueError: with what was wanted and what came.
    """
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} {list(shape)}, got {tensor.dtype} "
            f"{list(tensor.shape)} with strides {tensor.stride()}"
        )
