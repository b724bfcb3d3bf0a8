"""Depth routing of one layer: which rows it takes, where their K/V go, and the blend of its result.

`take` is two launches up to 64 rows, three beyond: the scores of `routing`, then selection, entries
and the list of rows, by one program or, where rows do not fit into one, by a count and a launch
that writes. `blend` and `gather` are one launch each. x is [T, D] in any float format with
contiguous rows; all else is contiguous, sums are float32. A padding row has modality and sequence
-1: it is never taken, and nothing is written for it but its own entries of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momaserve.kernels.reference_depth import EntryTables, TakenRows
from momaserve.kernels.reference_routing import RouterWeights
from momaserve.kernels.triton import depth_kernels, routing
from momaserve.kernels.triton.jit import ceil_div, coarse, power_of_2

LISTED_ROWS = 64
"""Rows that one program selects for, at most."""


def take(
    x: Tensor,
    modality: Tensor,
    policy: Tensor,
    routers: RouterWeights,
    tables: EntryTables,
    *,
    chosen: Tensor | None = None,
    out: TakenRows | None = None,
) -> TakenRows:
    """As `reference_depth.take`; nothing waits for the device.

    Raises:
        ValueError: shapes or number formats that do not fit together.
    """
    num_rows, num_sequences = len(x), len(tables.num_entries)
    out = TakenRows.empty(num_rows, x.device) if out is None else out
    _check_tables(tables, num_rows, num_sequences)
    if routers.num_experts != 1 or routers.max_group != 1:
        raise ValueError(f"a depth router has one output, got {routers.num_experts}")
    if chosen is not None:
        routing.check("chosen", chosen, (num_rows, 1), torch.bool)
        chosen = chosen.view(torch.int8)
    for name in ("slots", "rows", "places"):
        routing.check(f"out.{name}", getattr(out, name), (num_rows,), torch.int32)
    routing.check("out.taken", out.taken, (num_rows,), torch.bool)
    routing.check("out.weight", out.weight, (num_rows,), torch.float32)
    routing.check("out.count", out.count, (1,), torch.int32)
    if not num_rows:
        out.count.zero_()
        return out
    found = routing.scores(x, modality, policy, routers)
    rows = min(power_of_2(num_rows), LISTED_ROWS)
    num_tiles = ceil_div(num_rows, rows)
    counts = entries_before = None
    if num_tiles > 1:
        counts = x.new_empty(num_tiles, dtype=torch.int32)
        entries_before = torch.empty_like(tables.num_entries)
    places = (tables.sequences, tables.positions, tables.cu_seqlens_q)
    memory = (tables.block_tables, tables.entry_tables, tables.num_entries, tables.index)
    sizes = (
        tables.block_tables.stride(0),
        tables.entry_tables.stride(0),
        tables.entry_tables.shape[1],
        tables.block_size,
        tables.block_stride,
    )
    taken = out.taken.view(torch.int8)
    num_slices = len(found.partials)
    depth_kernels.take_rows[(num_tiles,)](
        modality,
        policy,
        chosen,
        routers.thresholds,
        routers.groups,
        found.logits,
        found.partials,
        *places,
        *memory,
        taken,
        out.weight,
        out.slots,
        out.rows,
        out.places,
        out.count,
        counts,
        entries_before,
        num_rows,
        num_slices,
        num_sequences,
        *sizes,
        BLOCK_T=rows,
        BLOCK_A=routing.summed_slices(num_slices, rows),
        B_PAD=power_of_2(num_sequences),
        IS_ALL=num_tiles == 1,
        num_warps=4,
    )
    if num_tiles > 1:
        depth_kernels.enter_rows[(num_tiles,)](
            *places,
            *memory,
            taken,
            out.slots,
            out.rows,
            out.places,
            out.count,
            counts,
            entries_before,
            num_rows,
            *sizes,
            BLOCK_T=rows,
            TILES_PAD=coarse(num_tiles),
            num_warps=4,
        )
    return out


def gather(x: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """As `reference_depth.gather`."""
    num_rows, width = len(rows), x.shape[1]
    routing.check("rows", rows, (num_rows,), torch.int32)
    out = x.new_empty(num_rows, width) if out is None else out
    routing.check("out", out, (num_rows, width), x.dtype)
    if x.stride(1) != 1:
        raise ValueError(f"rows of x must be contiguous, got strides {x.stride()}")
    if num_rows:
        block = min(1024, power_of_2(width))
        grid = (num_rows, ceil_div(width, block))
        depth_kernels.gather[grid](x, rows, out, x.stride(0), WIDTH=width, BLOCK=block, num_warps=4)
    return out


def blend(
    x: Tensor, block: Tensor, weight: Tensor, places: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """As `reference_depth.blend`.

    Raises:
        ValueError: shapes or number formats that do not fit together.
    """
    num_rows, width = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    routing.check("weight", weight, (num_rows,), torch.float32)
    routing.check("places", places, (num_rows,), torch.int32)
    for name, tensor, size in (("x", x, num_rows), ("block", block, -1), ("out", out, num_rows)):
        rows, columns = tensor.shape
        if (
            size not in (-1, rows)
            or columns != width
            or tensor.dtype != x.dtype
            or tensor.stride(1) != 1
        ):
            raise ValueError(
                f"{name} must be {x.dtype} [{size}, {width}] with contiguous rows, got "
                f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()}"
            )
    if num_rows:
        size = min(1024, power_of_2(width))
        depth_kernels.blend[(num_rows, ceil_div(width, size))](
            x,
            block,
            weight,
            places,
            out,
            x.stride(0),
            block.stride(0),
            out.stride(0),
            WIDTH=width,
            BLOCK=size,
            num_warps=4,
        )
    return out


def _check_tables(tables: EntryTables, num_rows: int, num_sequences: int) -> None:
    for name, shape in (
        ("sequences", (num_rows,)),
        ("positions", (num_rows,)),
        ("cu_seqlens_q", (num_sequences + 1,)),
        ("num_entries", (num_sequences,)),
        ("block_tables", (num_sequences, tables.block_tables.shape[1])),
        ("entry_tables", (num_sequences, tables.entry_tables.shape[1])),
        ("index", tuple(tables.index.shape)),
    ):
        routing.check(name, getattr(tables, name), shape, torch.int32)
