"""Kernels of `depth`, which has the contract."""

from __future__ import annotations

from momaserve.kernels.triton.jit import kernel, kernel_for_any, tl
from momaserve.kernels.triton.routing_kernels import select_tile


@kernel
def _larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.maximum(a, b)


@kernel
def _enter(
    rows: tl.tensor,
    selected: tl.tensor,
    first_number: tl.tensor,
    carried: tl.tensor,
    total: tl.tensor,
    sequences: tl.tensor,
    positions: tl.tensor,
    cu_seqlens_q: tl.tensor,
    block_tables: tl.tensor,
    entry_tables: tl.tensor,
    entries_before: tl.tensor,
    num_entries: tl.tensor,
    index: tl.tensor,
    slots: tl.tensor,
    listed: tl.tensor,
    places: tl.tensor,
    num_rows: tl.tensor,
    blocks_stride: tl.tensor,
    entries_stride: tl.tensor,
    num_entry_blocks: tl.tensor,
    block_size: tl.tensor,
    block_stride: tl.tensor,
) -> None:
    """Entries, index and list of a tile of rows.

    selected: int32, whether a row is taken; first_number: taken rows before the tile; carried:
    those among them of the sequence that the tile's first row belongs to; total: of all tiles.
    """
    is_row = rows < num_rows
    before = tl.cumsum(selected, axis=0) - selected
    number = first_number + before
    tl.store(places + rows, tl.where(selected > 0, number, -1), mask=is_row)
    tl.store(listed + number, rows, mask=is_row & (selected > 0))
    tl.store(listed + rows, tl.full(rows.shape, -1, tl.int32), mask=is_row & (rows >= total))

    sequence = tl.load(sequences + rows, mask=is_row, other=-1)
    is_real = sequence >= 0
    start = tl.load(cu_seqlens_q + sequence, mask=is_real, other=-1)
    end = tl.load(cu_seqlens_q + sequence + 1, mask=is_real, other=-1)
    # What was taken before the latest start is the largest such number, since it never falls.
    at_start = tl.associative_scan(tl.where(rows == start, before, -1), 0, _larger)
    rank = tl.where(at_start >= 0, before - at_start, before + carried)
    entry = tl.load(entries_before + sequence, mask=is_real, other=0) + rank
    block = entry // block_stride
    is_entry = is_real & (selected > 0) & (block < num_entry_blocks)
    at = sequence.to(tl.int64) * entries_stride + block
    home = tl.load(entry_tables + at, mask=is_entry, other=0)
    slot = tl.where(is_entry, home * block_stride + entry % block_stride, -1)
    tl.store(slots + rows, slot, mask=is_row)

    position = tl.load(positions + rows, mask=is_real, other=0)
    at = sequence.to(tl.int64) * blocks_stride + position // block_size
    block = tl.load(block_tables + at, mask=is_real, other=0)
    tl.store(index + block * block_size + position % block_size, slot, mask=is_real)
    # Everybody has read the old counts.
    tl.debug_barrier()
    tl.store(num_entries + sequence, entry + selected, mask=is_real & (rows == end - 1))


@kernel_for_any(
    "num_rows",
    "num_slices",
    "num_sequences",
    "blocks_stride",
    "entries_stride",
    "num_entry_blocks",
)
def take_rows(
    modality: tl.tensor,
    policy: tl.tensor,
    chosen: tl.tensor,
    thresholds: tl.tensor,
    groups: tl.tensor,
    logits: tl.tensor,
    partials: tl.tensor,
    sequences: tl.tensor,
    positions: tl.tensor,
    cu_seqlens_q: tl.tensor,
    block_tables: tl.tensor,
    entry_tables: tl.tensor,
    num_entries: tl.tensor,
    index: tl.tensor,
    taken: tl.tensor,
    weights: tl.tensor,
    slots: tl.tensor,
    listed: tl.tensor,
    places: tl.tensor,
    count: tl.tensor,
    counts: tl.tensor,
    entries_before: tl.tensor,
    num_rows: tl.tensor,
    num_slices: tl.tensor,
    num_sequences: tl.tensor,
    blocks_stride: tl.tensor,
    entries_stride: tl.tensor,
    num_entry_blocks: tl.tensor,
    block_size: tl.tensor,
    block_stride: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
    B_PAD: tl.constexpr,
    IS_ALL: tl.constexpr,
) -> None:
    """Grid [row tiles]: selects; with IS_ALL there is one tile, and everything is written.

    Otherwise counts int32 [tiles] gets the taken rows of each, and entries_before int32 [B] a
    copy of the counts that the next launch overwrites.
    """
    tile = tl.program_id(0)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    found, scale = select_tile(
        rows,
        modality,
        policy,
        None,
        chosen,
        thresholds,
        groups,
        logits,
        partials,
        num_rows,
        num_slices,
        1,
        1,
        1,
        BLOCK_A,
    )
    selected = tl.sum(found.to(tl.int32), axis=0)
    tl.store(taken + rows, selected.to(tl.int8), mask=rows < num_rows)
    tl.store(weights + rows, tl.sum(scale, axis=0), mask=rows < num_rows)
    total = tl.sum(selected, axis=0)
    if IS_ALL:
        tl.store(count, total)
        _enter(
            rows,
            selected,
            0,
            0,
            total,
            sequences,
            positions,
            cu_seqlens_q,
            block_tables,
            entry_tables,
            num_entries,
            num_entries,
            index,
            slots,
            listed,
            places,
            num_rows,
            blocks_stride,
            entries_stride,
            num_entry_blocks,
            block_size,
            block_stride,
        )
    else:
        tl.store(counts + tile, total)
        if tile == 0:
            numbers = tl.arange(0, B_PAD)
            is_one = numbers < num_sequences
            old = tl.load(num_entries + numbers, mask=is_one, other=0)
            tl.store(entries_before + numbers, old, mask=is_one)


@kernel_for_any("num_rows", "blocks_stride", "entries_stride", "num_entry_blocks")
def enter_rows(
    sequences: tl.tensor,
    positions: tl.tensor,
    cu_seqlens_q: tl.tensor,
    block_tables: tl.tensor,
    entry_tables: tl.tensor,
    num_entries: tl.tensor,
    index: tl.tensor,
    taken: tl.tensor,
    slots: tl.tensor,
    listed: tl.tensor,
    places: tl.tensor,
    count: tl.tensor,
    counts: tl.tensor,
    entries_before: tl.tensor,
    num_rows: tl.tensor,
    blocks_stride: tl.tensor,
    entries_stride: tl.tensor,
    num_entry_blocks: tl.tensor,
    block_size: tl.tensor,
    block_stride: tl.tensor,
    BLOCK_T: tl.constexpr,
    TILES_PAD: tl.constexpr,
) -> None:
    """Grid [row tiles]: writes what `take_rows` counted."""
    tile = tl.program_id(0)
    first_row = tile * BLOCK_T
    tiles = tl.arange(0, TILES_PAD)
    found = tl.load(counts + tiles, mask=tiles < tl.num_programs(0), other=0)
    total = tl.sum(found, axis=0)
    before = tl.sum(tl.where(tiles < tile, found, 0), axis=0)
    if tile == 0:
        tl.store(count, total)
    # Only the sequence of the first row can have begun in an earlier tile.
    sequence = tl.load(sequences + first_row)
    start = first_row
    if sequence >= 0:
        start = tl.load(cu_seqlens_q + sequence)
    home = start // BLOCK_T
    near = home * BLOCK_T + tl.arange(0, BLOCK_T)
    flags = tl.load(taken + near, mask=near < start, other=0).to(tl.int32)
    carried = before - tl.sum(tl.where(tiles < home, found, 0), axis=0) - tl.sum(flags, axis=0)
    rows = first_row + tl.arange(0, BLOCK_T)
    selected = tl.load(taken + rows, mask=rows < num_rows, other=0).to(tl.int32)
    _enter(
        rows,
        selected,
        before,
        carried,
        total,
        sequences,
        positions,
        cu_seqlens_q,
        block_tables,
        entry_tables,
        entries_before,
        num_entries,
        index,
        slots,
        listed,
        places,
        num_rows,
        blocks_stride,
        entries_stride,
        num_entry_blocks,
        block_size,
        block_stride,
    )


@kernel
def gather(
    x: tl.tensor,
    rows: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid [R, ceil(D / BLOCK)]: a row of x, or zero."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + place).to(tl.int64)
    width = tl.where(row >= 0, WIDTH, 0)
    found = tl.load(x + row * x_stride + columns, mask=columns < width, other=0.0)
    tl.store(out + place * WIDTH + columns, found, mask=columns < WIDTH)


@kernel
def blend(
    x: tl.tensor,
    block: tl.tensor,
    weight: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    block_stride: tl.tensor,
    out_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid [T, ceil(D / BLOCK)]; out may be x."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < WIDTH
    place = tl.load(places + row).to(tl.int64)
    scale = tl.load(weight + row)
    old = tl.load(x + row * x_stride + columns, mask=is_column, other=0.0)
    width = tl.where(place >= 0, WIDTH, 0)
    new = tl.load(block + place * block_stride + columns, mask=columns < width, other=0.0)
    wide = old.to(tl.float32)
    mixed = (wide + scale * (new.to(tl.float32) - wide)).to(old.dtype)
    mixed = tl.where(scale == 1.0, new, mixed)
    tl.store(out + row * out_stride + columns, tl.where(place >= 0, mixed, old), mask=is_column)
