"""Kernels of `experts`, which has the contract."""

from __future__ import annotations

from typing import Any

from momaserve.kernels.triton.jit import kernel, kernel_for_any, tl


@kernel
def direct_gate_up(
    u: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    hidden: tl.tensor,
    tokens: tl.tensor,
    offsets: tl.tensor,
    u_stride: tl.tensor,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """hidden [P, STRIDE], in u's format, = silu(gate u) * up u of each pair, zero from INNER on.

    Grid [P * ceil(STRIDE / BLOCK_F)]; STRIDE is Fp, INNER is F.
    """
    start = tl.load(offsets)
    num_pairs = tl.load(offsets + E) - start
    # Before the way out, so that one wait brings both.
    ends = tl.load(offsets + 1 + tl.arange(0, E_PAD), mask=tl.arange(0, E_PAD) < E, other=1 << 30)
    program = tl.program_id(0)
    if program >= num_pairs * ((STRIDE + BLOCK_F - 1) // BLOCK_F):
        return
    pair = start + program % num_pairs
    expert = tl.sum((ends <= pair).to(tl.int32), axis=0).to(tl.int64)
    row = tl.load(tokens + pair).to(tl.int64)
    outputs = (program // num_pairs) * BLOCK_F + tl.arange(0, BLOCK_F)
    w_rows = expert * STRIDE * WIDTH + tl.minimum(outputs, INNER - 1)[:, None] * WIDTH
    columns = tl.arange(0, BLOCK_D)
    gated = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    raised = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
    for begin in tl.static_range(0, WIDTH, BLOCK_D):
        at = begin + columns
        if WIDTH % BLOCK_D == 0:
            g = tl.load(gate + w_rows + at[None, :])
            w = tl.load(up + w_rows + at[None, :])
            x = tl.load(u + row * u_stride + at)
        else:
            is_column = (at < WIDTH)[None, :]
            g = tl.load(gate + w_rows + at[None, :], mask=is_column, other=0.0)
            w = tl.load(up + w_rows + at[None, :], mask=is_column, other=0.0)
            x = tl.load(u + row * u_stride + at, mask=at < WIDTH, other=0.0)
        wide = x.to(tl.float32)[None, :]
        gated += g.to(tl.float32) * wide
        raised += w.to(tl.float32) * wide
    g = tl.sum(gated, axis=1)
    h = tl.where(outputs < INNER, g * tl.sigmoid(g) * tl.sum(raised, axis=1), 0.0)
    h_at = hidden + pair.to(tl.int64) * STRIDE + outputs
    tl.store(h_at, h.to(hidden.dtype.element_ty), mask=outputs < STRIDE)


@kernel
def direct_down(
    hidden: tl.tensor,
    down: tl.tensor,
    weights: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    places_stride: tl.tensor,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACCUMULATE: tl.constexpr,
) -> None:
    """out float32 [T, D] (+)= sum over a row's pairs of weight * (down hidden).

    Grid [T, ceil(D / BLOCK_D)].
    """
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_output = outputs < WIDTH
    experts = tl.arange(0, E_PAD)
    mine = tl.load(places + row * places_stride + experts, mask=experts < E, other=-1)
    columns = tl.arange(0, BLOCK_F)
    w_rows = tl.minimum(outputs, WIDTH - 1)[:, None] * STRIDE
    if ACCUMULATE:
        total = tl.load(out + row * WIDTH + outputs, mask=is_output, other=0.0)
    else:
        total = tl.zeros((BLOCK_D,), tl.float32)
    for expert in range(0, E):
        pair = tl.max(tl.where(experts == expert, mine, -1), axis=0)
        if pair >= 0:
            w_start = down + tl.cast(expert, tl.int64) * WIDTH * STRIDE
            h_start = hidden + pair.to(tl.int64) * STRIDE
            sums = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
            for begin in tl.static_range(0, STRIDE, BLOCK_F):
                at = begin + columns
                if begin + BLOCK_F <= STRIDE:
                    w = tl.load(w_start + w_rows + at[None, :])
                    h = tl.load(h_start + at)
                else:
                    is_column = at < STRIDE
                    w = tl.load(w_start + w_rows + at[None, :], mask=is_column[None, :], other=0.0)
                    h = tl.load(h_start + at, mask=is_column, other=0.0)
                sums += w.to(tl.float32) * h.to(tl.float32)[None, :]
            total += tl.load(weights + pair) * tl.sum(sums, axis=1)
    tl.store(out + row * WIDTH + outputs, total, mask=is_output)


@kernel
def _tile_of(
    offsets: tl.tensor,
    program: tl.tensor,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> Any:
    """(expert, first pair, end of the expert's pairs, row tiles of all experts) of a program.

    Row tiles are numbered by expert; programs of one output tile follow each other.
    """
    experts = tl.arange(0, E_PAD)
    starts = tl.load(offsets + experts, mask=experts < E, other=0)
    ends = tl.load(offsets + experts + 1, mask=experts < E, other=0)
    tiles = (ends - starts + BLOCK_P - 1) // BLOCK_P
    before = tl.cumsum(tiles, axis=0)
    num_tiles = tl.sum(tiles, axis=0)
    tile = program % tl.maximum(num_tiles, 1)
    expert = tl.sum((before <= tile).to(tl.int32), axis=0)
    is_mine = experts == expert
    skipped = tile - tl.sum(tl.where(is_mine, before - tiles, 0), axis=0)
    first = tl.sum(tl.where(is_mine, starts, 0), axis=0) + skipped * BLOCK_P
    end = tl.sum(tl.where(is_mine, ends, 0), axis=0)
    return expert, first, end, num_tiles


@kernel
def grouped_gate_up(
    u: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    hidden: tl.tensor,
    tokens: tl.tensor,
    offsets: tl.tensor,
    u_stride: tl.tensor,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """hidden [P, STRIDE], in u's format, = silu(gate u) * up u of each pair, zero from INNER on.

    Grid [most row tiles * ceil(STRIDE / BLOCK_F)].
    """
    program = tl.program_id(0)
    expert, first, end, num_tiles = _tile_of(offsets, program, E, E_PAD, BLOCK_P)
    if program >= num_tiles * ((STRIDE + BLOCK_F - 1) // BLOCK_F):
        return
    pairs = first + tl.arange(0, BLOCK_P)
    is_pair = pairs < end
    rows = tl.load(tokens + pairs, mask=is_pair, other=0).to(tl.int64)
    outputs = (program // num_tiles) * BLOCK_F + tl.arange(0, BLOCK_F)
    columns = tl.arange(0, BLOCK_D)
    # What is read in place of missing pairs and outputs is there, and is not stored.
    x_at = u + rows[:, None] * u_stride + columns[None, :]
    near = tl.minimum(outputs, INNER - 1)
    w_at = expert.to(tl.int64) * STRIDE * WIDTH + near[None, :] * WIDTH + columns[:, None]
    gated = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    raised = tl.zeros((BLOCK_P, BLOCK_F), tl.float32)
    for begin in range(0, WIDTH, BLOCK_D):
        if WIDTH % BLOCK_D == 0:
            x = tl.load(x_at + begin)
            g = tl.load(gate + w_at + begin)
            w = tl.load(up + w_at + begin)
        else:
            is_column = begin + columns < WIDTH
            x = tl.load(x_at + begin, mask=is_column[None, :], other=0.0)
            g = tl.load(gate + w_at + begin, mask=is_column[:, None], other=0.0)
            w = tl.load(up + w_at + begin, mask=is_column[:, None], other=0.0)
        gated = tl.dot(x, g, gated, input_precision="ieee")
        raised = tl.dot(x, w, raised, input_precision="ieee")
    h = tl.where((outputs < INNER)[None, :], gated * tl.sigmoid(gated) * raised, 0.0)
    h_at = hidden + pairs.to(tl.int64)[:, None] * STRIDE + outputs[None, :]
    tl.store(
        h_at, h.to(hidden.dtype.element_ty), mask=is_pair[:, None] & (outputs < STRIDE)[None, :]
    )


@kernel_for_any("num_pairs")
def grouped_down(
    hidden: tl.tensor,
    down: tl.tensor,
    weights: tl.tensor,
    sums: tl.tensor,
    offsets: tl.tensor,
    num_pairs: tl.tensor,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SHARES: tl.constexpr,
) -> None:
    """sums float32 [SHARES, P, D]: weight * (down hidden) of each pair, cut into shares of F.

    Grid [most row tiles * ceil(D / BLOCK_D) * SHARES]; num_pairs is P.
    """
    program = tl.program_id(0)
    expert, first, end, num_tiles = _tile_of(offsets, program, E, E_PAD, BLOCK_P)
    if program >= num_tiles * ((WIDTH + BLOCK_D - 1) // BLOCK_D) * SHARES:
        return
    piece = program // num_tiles
    share = piece % SHARES
    pairs = first + tl.arange(0, BLOCK_P)
    is_pair = pairs < end
    outputs = (piece // SHARES) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_F)
    near_pairs = tl.minimum(pairs, end - 1).to(tl.int64)
    h_at = hidden + near_pairs[:, None] * STRIDE + columns[None, :]
    near = tl.minimum(outputs, WIDTH - 1)
    w_at = down + expert.to(tl.int64) * WIDTH * STRIDE + near[None, :] * STRIDE + columns[:, None]
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    size: tl.constexpr = ((STRIDE + BLOCK_F - 1) // BLOCK_F + SHARES - 1) // SHARES * BLOCK_F
    for begin in range(share * size, tl.minimum(share * size + size, STRIDE), BLOCK_F):
        if STRIDE % BLOCK_F == 0:
            h = tl.load(h_at + begin)
            w = tl.load(w_at + begin)
        else:
            is_column = begin + columns < STRIDE
            h = tl.load(h_at + begin, mask=is_column[None, :], other=0.0)
            w = tl.load(w_at + begin, mask=is_column[:, None], other=0.0)
        total = tl.dot(h, w, total, input_precision="ieee")
    scale = tl.load(weights + pairs, mask=is_pair, other=0.0)
    targets = sums + (share * num_pairs + pairs.to(tl.int64))[:, None] * WIDTH + outputs[None, :]
    mask = is_pair[:, None] & (outputs < WIDTH)[None, :]
    tl.store(targets, total * scale[:, None], mask=mask)


@kernel_for_any("num_pairs")
def add_pairs(
    sums: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    places_stride: tl.tensor,
    num_pairs: tl.tensor,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACCUMULATE: tl.constexpr,
) -> None:
    """out float32 [T, D] (+)= what a row's pairs add up to; grid [T, ceil(D / BLOCK_D)]."""
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_output = outputs < WIDTH
    experts = tl.arange(0, E_PAD)
    mine = tl.load(places + row * places_stride + experts, mask=experts < E, other=-1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    if ACCUMULATE:
        total = tl.load(out + row * WIDTH + outputs, mask=is_output, other=0.0)
    for expert in range(0, E):
        pair = tl.max(tl.where(experts == expert, mine, -1), axis=0)
        if pair >= 0:
            for share in tl.static_range(SHARES):
                at = (share * num_pairs + pair.to(tl.int64)) * WIDTH + outputs
                total += tl.load(sums + at, mask=is_output, other=0.0)
    tl.store(out + row * WIDTH + outputs, total, mask=is_output)
