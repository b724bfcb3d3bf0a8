"""The device's part of `triton.attention`, where shapes and meanings stand: two kernels, one loop.

Strides are in elements. Products accumulate in float32, softmax is float32 in powers of two.
"""

from __future__ import annotations

from momaserve.kernels.triton.jit import kernel, kernel_for_any, tl


@kernel
def _visit(
    q: tl.tensor,
    acc: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    row_positions: tl.tensor,
    first: tl.tensor,
    whole: tl.tensor,
    last: tl.tensor,
    limit: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    index: tl.tensor,
    block_stride: tl.tensor,
    layer_offset: tl.tensor,
    scale: tl.tensor,
    SLOT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Tiles `first` to `last` of positions, exclusive, added to the softmax so far.

    Those below `whole` all rows see whole; the others are masked, and from `limit` on not read.
    q [M, K], acc float32 [M, K], best and total float32 [M] (in powers of two), row_positions
    [M]. keys and values point to the kv head, table to the sequence.
    """
    columns = tl.arange(0, HEAD_DIM)
    for masked in tl.static_range(2):
        begin = tl.maximum(first, whole) if masked else first
        end = last if masked else tl.minimum(last, whole)
        for tile in tl.range(begin, end, num_stages=TAIL_STAGES if masked else STAGES):
            positions = tile * POSITIONS + tl.arange(0, POSITIONS)
            exists = positions < limit
            if POSITIONS <= BLOCK_SIZE:
                block = tl.load(table + tile * POSITIONS // BLOCK_SIZE).to(tl.int64)
            elif masked:
                block = tl.load(table + positions // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
            else:
                block = tl.load(table + positions // BLOCK_SIZE).to(tl.int64)
            offsets = positions % BLOCK_SIZE
            if index is None:
                slots = block * block_stride + layer_offset + offsets
            else:
                places = index + block * BLOCK_SIZE + offsets
                if masked:
                    slots = tl.load(places, mask=exists, other=-1).to(tl.int64)
                else:
                    slots = tl.load(places).to(tl.int64)
                exists = slots >= 0
            where = slots[:, None] * SLOT + columns[None, :]
            if masked or index is not None:
                k = tl.load(keys + where, mask=exists[:, None], other=0.0)
                v = tl.load(values + where, mask=exists[:, None], other=0.0)
            else:
                k = tl.load(keys + where)
                v = tl.load(values + where)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if masked:
                seen = positions[None, :] <= row_positions[:, None]
                scores = tl.where(seen, scores, -float("inf"))
            if index is not None:
                scores = tl.where(exists[None, :], scores, -float("inf"))
            higher = tl.maximum(best, tl.max(scores, axis=1) * scale)
            fade = tl.exp2(best - higher)
            weights = tl.exp2(scores * scale - higher[:, None])
            total = total * fade + tl.sum(weights, axis=1)
            best = higher
            acc = acc * fade[:, None]
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, best, total


@kernel
def _clear(
    out: tl.tensor,
    cu_seqlens_q: tl.tensor,
    num_rows: tl.tensor,
    num_sequences: tl.tensor,
    sequence: tl.tensor,
    row_stride: tl.tensor,
    places: tl.tensor,
    mask: tl.tensor,
) -> None:
    """Zeros in the rows of no sequence, shared out among the programs of the sequences."""
    first = tl.load(cu_seqlens_q + num_sequences).to(tl.int64) + sequence
    for row in tl.range(first, num_rows, num_sequences):  # int64, as its start is
        tl.store(out + row * row_stride + places, 0.0, mask=mask)


@kernel_for_any("num_rows", "layer_offset", "table_stride")
def decode(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    cu_seqlens_q: tl.tensor,
    index: tl.tensor,
    parts: tl.tensor,
    out: tl.tensor,
    q_stride: tl.tensor,
    out_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    layer_offset: tl.tensor,
    num_rows: tl.tensor,
    scale: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One row per sequence; grid [G, splits, B], kv heads first: neighbours read one slot's rows.

    Without `parts` there is one split, which writes `out` itself. SHARED query heads per kv head
    are the first of ROWS rows of a tile; the rest are the padding that matrix units ask for.
    """
    group = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    num_splits = tl.num_programs(1)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, HEAD_DIM)
    heads = group * SHARED + rows
    places = heads[:, None] * HEAD_DIM + columns[None, :]
    valid = (rows < SHARED)[:, None]
    if parts is None:
        _clear(
            out,
            cu_seqlens_q,
            num_rows,
            tl.num_programs(2),
            sequence,
            out_stride,
            places,
            valid,
        )
    row = tl.load(cu_seqlens_q + sequence)
    length = tl.load(seq_lens + sequence)
    num_tiles = tl.cdiv(length, POSITIONS)
    share = tl.maximum(tl.cdiv(num_tiles, num_splits), MIN_TILES)
    first = split * share
    last = tl.minimum(first + share, num_tiles)
    if tl.load(cu_seqlens_q + sequence + 1) > row and first < last:
        tile_of_q = tl.load(q + row.to(tl.int64) * q_stride + places, mask=valid, other=0.0)
        acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        # Finite, so that what sees nothing yet has a difference of zero, not of infinities.
        best = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        row_positions = tl.zeros([ROWS], tl.int32) + (length - 1)
        table = block_tables + sequence.to(tl.int64) * table_stride
        acc, best, total = _visit(
            tile_of_q,
            acc,
            best,
            total,
            row_positions,
            first,
            length // POSITIONS,
            last,
            length,
            keys + group * HEAD_DIM,
            values + group * HEAD_DIM,
            table,
            index,
            block_stride,
            layer_offset,
            scale,
            SLOT=NUM_KV_HEADS * HEAD_DIM,
            HEAD_DIM=HEAD_DIM,
            BLOCK_SIZE=BLOCK_SIZE,
            POSITIONS=POSITIONS,
            STAGES=STAGES,
            TAIL_STAGES=1,
            PRECISION=PRECISION,
        )
        nothing = total == 0.0
        divisor = tl.where(nothing, 1.0, total)
        acc = acc / divisor[:, None]
        if parts is None:
            target = out + row.to(tl.int64) * out_stride + places
            tl.store(target, acc.to(out.dtype.element_ty), mask=valid)
        else:
            part = (split * tl.num_programs(2) + sequence) * NUM_KV_HEADS * SHARED + heads
            target = parts + part.to(tl.int64) * PART
            tl.store(target[:, None] + columns[None, :], acc, mask=valid)
            height = tl.where(nothing, -float("inf"), best + tl.log2(divisor))
            tl.store(target + HEAD_DIM, height, mask=rows < SHARED)


@kernel_for_any("num_rows", "num_splits")
def join(
    parts: tl.tensor,
    seq_lens: tl.tensor,
    cu_seqlens_q: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    POSITIONS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    PART: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """The parts of one row and head, weighted by their sums; grid [H, B]; SPLITS >= num_splits."""
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    columns = tl.arange(0, HEAD_DIM)
    _clear(
        out,
        cu_seqlens_q,
        num_rows,
        tl.num_programs(1),
        sequence,
        out_stride,
        head * HEAD_DIM + columns,
        columns >= 0,
    )
    row = tl.load(cu_seqlens_q + sequence)
    if tl.load(cu_seqlens_q + sequence + 1) > row:
        num_tiles = tl.cdiv(tl.load(seq_lens + sequence), POSITIONS)
        share = tl.maximum(tl.cdiv(num_tiles, num_splits), MIN_TILES)
        splits = tl.arange(0, SPLITS)
        written = splits * share < num_tiles
        part = (splits * tl.num_programs(1) + sequence) * tl.num_programs(0) + head
        source = parts + part.to(tl.int64) * PART
        heights = tl.load(source + HEAD_DIM, mask=written, other=-float("inf"))
        weights = tl.exp2(heights - tl.maximum(tl.max(heights, axis=0), -1e30))
        total = tl.sum(weights, axis=0)
        rows = tl.load(source[:, None] + columns[None, :], mask=written[:, None], other=0.0)
        acc = tl.sum(rows * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
        target = out + row.to(tl.int64) * out_stride + head * HEAD_DIM + columns
        tl.store(target, acc.to(out.dtype.element_ty))


@kernel_for_any("num_rows", "layer_offset", "table_stride")
def prefill(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    cu_seqlens_q: tl.tensor,
    index: tl.tensor,
    out: tl.tensor,
    q_stride: tl.tensor,
    out_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    layer_offset: tl.tensor,
    num_rows: tl.tensor,
    scale: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Tiles of a sequence's rows, each with all SHARED heads of a kv head; grid [tiles, G, B].

    The last rows, which see most, go first. A row r of the tile is query r // SHARED, head
    r % SHARED of the group.
    """
    QUERIES: tl.constexpr = ROWS // SHARED
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group = tl.program_id(1)
    sequence = tl.program_id(2)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, HEAD_DIM)
    heads = group * SHARED + rows % SHARED
    if tile == 0:
        _clear(
            out,
            cu_seqlens_q,
            num_rows,
            tl.num_programs(2),
            sequence,
            out_stride,
            heads[:, None] * HEAD_DIM + columns[None, :],
            (rows < SHARED)[:, None],
        )
    start = tl.load(cu_seqlens_q + sequence)
    num_queries = tl.load(cu_seqlens_q + sequence + 1) - start
    first_query = tile * QUERIES
    if first_query < num_queries:
        length = tl.load(seq_lens + sequence)
        before = length - num_queries
        queries = first_query + rows // SHARED
        valid = ((rows // SHARED < QUERIES) & (queries < num_queries))[:, None]
        row_positions = tl.minimum(before + queries, length - 1)
        places = heads[:, None] * HEAD_DIM + columns[None, :]
        row = (start + queries).to(tl.int64)[:, None]
        tile_of_q = tl.load(q + row * q_stride + places, mask=valid, other=0.0)
        acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        best = tl.full([ROWS], -1e30, tl.float32)  # finite, as in decode
        total = tl.zeros([ROWS], tl.float32)
        limit = tl.minimum(before + first_query + QUERIES, length)
        whole = (before + first_query + 1) // POSITIONS  # tiles that all rows see whole
        table = block_tables + sequence.to(tl.int64) * table_stride
        acc, best, total = _visit(
            tile_of_q,
            acc,
            best,
            total,
            row_positions,
            0,
            whole,
            tl.cdiv(limit, POSITIONS),
            limit,
            keys + group * HEAD_DIM,
            values + group * HEAD_DIM,
            table,
            index,
            block_stride,
            layer_offset,
            scale,
            SLOT=NUM_KV_HEADS * HEAD_DIM,
            HEAD_DIM=HEAD_DIM,
            BLOCK_SIZE=BLOCK_SIZE,
            POSITIONS=POSITIONS,
            STAGES=STAGES,
            TAIL_STAGES=STAGES,
            PRECISION=PRECISION,
        )
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + row * out_stride + places, acc.to(out.dtype.element_ty), mask=valid)
