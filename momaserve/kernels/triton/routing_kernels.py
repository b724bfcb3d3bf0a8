"""Kernels of `routing`, which has the contract."""

from __future__ import annotations

from typing import Any

from momaserve.kernels import reference_routing
from momaserve.kernels.triton.jit import kernel, kernel_for_any, tl

_CAUSAL = tl.constexpr(reference_routing.CAUSAL)
_CALIBRATED = tl.constexpr(reference_routing.CALIBRATED)
_EXPERT_CHOICE = tl.constexpr(reference_routing.EXPERT_CHOICE)
_THRESHOLD = tl.constexpr(reference_routing.THRESHOLD)


@kernel
def _main_of_row(
    x_row: tl.tensor,
    main: tl.tensor,
    target: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    WIDTH: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Main logits of one row, stored from `target` on."""
    experts = tl.arange(0, S_PAD)
    columns = tl.arange(0, BLOCK_D)
    w_rows = main + (first + experts).to(tl.int64)[:, None] * WIDTH
    total = tl.zeros((S_PAD, BLOCK_D), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK_D):
        at = start + columns
        x = tl.load(x_row + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        inside = (experts < count)[:, None] & (at < WIDTH)[None, :]
        total += tl.load(w_rows + at[None, :], mask=inside, other=0.0) * x[None, :]
    tl.store(target + experts, tl.sum(total, axis=1), mask=experts < count)


@kernel
def _slice_of_row(
    x_row: tl.tensor,
    fc1: tl.tensor,
    fc2: tl.tensor,
    target: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    router: tl.tensor,
    slice_number: tl.tensor,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """What some hidden units add to the auxiliary logits of one row, stored from `target` on."""
    experts = tl.arange(0, S_PAD)
    columns = tl.arange(0, BLOCK_D)
    units = slice_number * BLOCK_A + tl.arange(0, BLOCK_A)
    near = tl.minimum(units, INNER - 1)
    w_rows = fc1 + (router.to(tl.int64) * INNER + near)[:, None] * WIDTH
    total = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK_D):
        at = start + columns
        if WIDTH % BLOCK_D == 0:
            x = tl.load(x_row + at)
            w = tl.load(w_rows + at[None, :])
        else:
            x = tl.load(x_row + at, mask=at < WIDTH, other=0.0)
            w = tl.load(w_rows + at[None, :], mask=(at < WIDTH)[None, :], other=0.0)
        total += w.to(tl.float32) * x.to(tl.float32)[None, :]
    hidden = tl.sum(total, axis=1)
    hidden = hidden * tl.sigmoid(hidden)
    is_used = (experts < count)[:, None] & (units < INNER)[None, :]
    w2 = tl.load(fc2 + (first + experts)[:, None] * INNER + units[None, :], mask=is_used, other=0.0)
    tl.store(target + experts, tl.sum(w2 * hidden[None, :], axis=1), mask=experts < count)


@kernel_for_any("num_rows", "num_slices")
def score_rows(
    u: tl.tensor,
    modality: tl.tensor,
    policy: tl.tensor,
    taken: tl.tensor,
    groups: tl.tensor,
    main: tl.tensor,
    fc1: tl.tensor,
    fc2: tl.tensor,
    logits: tl.tensor,
    partials: tl.tensor,
    u_stride: tl.tensor,
    num_rows: tl.tensor,
    num_slices: tl.tensor,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Grid [slices + 1, T]: a slice of a row's auxiliary router, or its main logits.

    logits [T, S] and partials [slices, T, S] are float32, by number within the row's group.
    """
    piece = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    kind = tl.load(modality + row).to(tl.int32)
    code = tl.load(policy + row)
    if taken is not None:
        kind = tl.where(tl.load(taken + row) != 0, kind, -1)
    if kind < 0:
        return
    first = tl.load(groups + kind * 3)
    count = tl.load(groups + kind * 3 + 1)
    router = tl.load(groups + kind * 3 + 2)
    if router < 0:
        return
    x_row = u + row * u_stride
    if piece == num_slices:
        _main_of_row(x_row, main, logits + row * S, first, count, WIDTH, S_PAD, BLOCK_D)
    else:
        if code == _CAUSAL:
            target = partials + (piece * num_rows + row) * S
            _slice_of_row(
                x_row,
                fc1,
                fc2,
                target,
                first,
                count,
                router,
                piece,
                WIDTH,
                INNER,
                S_PAD,
                BLOCK_A,
                BLOCK_D,
            )


@kernel_for_any("num_rows", "num_slices")
def score_tiles(
    u: tl.tensor,
    modality: tl.tensor,
    policy: tl.tensor,
    taken: tl.tensor,
    groups: tl.tensor,
    main: tl.tensor,
    fc1: tl.tensor,
    fc2: tl.tensor,
    logits: tl.tensor,
    partials: tl.tensor,
    u_stride: tl.tensor,
    num_rows: tl.tensor,
    num_slices: tl.tensor,
    num_routers: tl.tensor,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    S: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW_D: tl.constexpr,
    IS_NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Grid [routers * slices + BLOCK_T, row tiles]: a slice of one auxiliary router for a tile of
    rows, or the main logits of one of its rows. Otherwise as `score_rows`.

    IS_NARROW: u and fc1 have one 16-bit format and are multiplied as they are; otherwise as
    float32 with PRECISION.
    """
    piece = tl.program_id(0)
    number_in_tile = piece - num_routers * num_slices
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    kinds = tl.load(modality + rows, mask=rows < num_rows, other=-1).to(tl.int32)
    codes = tl.load(policy + rows, mask=rows < num_rows, other=-1)
    is_mine = kinds >= 0
    if taken is not None:
        is_mine &= tl.load(taken + rows, mask=rows < num_rows, other=0) != 0
    first = tl.load(groups + kinds * 3, mask=is_mine, other=0)
    count = tl.load(groups + kinds * 3 + 1, mask=is_mine, other=0)
    router = tl.load(groups + kinds * 3 + 2, mask=is_mine, other=-1)
    mine = piece // tl.maximum(num_slices, 1)
    is_one = tl.arange(0, BLOCK_T) == number_in_tile
    is_causal = (router == mine) & (codes == _CAUSAL)
    is_mine &= tl.where(number_in_tile >= 0, is_one & (router >= 0), is_causal)
    if tl.max(is_mine.to(tl.int32), axis=0) == 0:
        return
    # All rows that are mine belong to one group.
    first_expert = tl.max(tl.where(is_mine, first, -1), axis=0)
    num_experts = tl.max(tl.where(is_mine, count, 0), axis=0)
    if number_in_tile >= 0:
        row = (tl.program_id(1) * BLOCK_T + number_in_tile).to(tl.int64)
        x_row = u + row * u_stride
        target = logits + row * S
        _main_of_row(x_row, main, target, first_expert, num_experts, WIDTH, S_PAD, ROW_D)
    else:
        slice_number = piece % num_slices
        units = slice_number * BLOCK_A + tl.arange(0, BLOCK_A)
        near = tl.minimum(units, INNER - 1)
        columns = tl.arange(0, BLOCK_D)
        # Rows beyond the last are read as the last: no mask, and nothing of them is stored.
        x_rows = u + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * u_stride
        w_rows = fc1 + (mine.to(tl.int64) * INNER + near)[None, :] * WIDTH
        hidden = tl.zeros((BLOCK_T, BLOCK_A), tl.float32)
        for start in range(0, WIDTH, BLOCK_D):
            at = start + columns
            if WIDTH % BLOCK_D == 0:
                x = tl.load(x_rows + at[None, :])
                w = tl.load(w_rows + at[:, None])
            else:
                x = tl.load(x_rows + at[None, :], mask=(at < WIDTH)[None, :], other=0.0)
                w = tl.load(w_rows + at[:, None], mask=(at < WIDTH)[:, None], other=0.0)
            if IS_NARROW:
                hidden = tl.dot(x, w, hidden)
            else:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
                hidden = tl.dot(x, w, hidden, input_precision=PRECISION)
        hidden = hidden * tl.sigmoid(hidden)
        targets = partials + (slice_number * num_rows + rows) * S
        for number in tl.static_range(S):
            is_used = units < tl.where(num_experts > number, INNER, 0)
            w2 = tl.load(fc2 + (first_expert + number) * INNER + units, mask=is_used, other=0.0)
            tl.store(targets + number, tl.sum(hidden * w2[None, :], axis=1), mask=is_mine)


@kernel
def select_tile(
    rows: tl.tensor,
    modality: tl.tensor,
    policy: tl.tensor,
    taken: tl.tensor,
    chosen: tl.tensor,
    thresholds: tl.tensor,
    groups: tl.tensor,
    logits: tl.tensor,
    partials: tl.tensor,
    num_rows: tl.tensor,
    num_slices: tl.tensor,
    S: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_A: tl.constexpr,
) -> Any:
    """(selected, weight), both [E_PAD, rows], of a tile of rows from what the first launch left."""
    is_row = rows < num_rows
    kinds = tl.load(modality + rows, mask=is_row, other=-1).to(tl.int32)
    is_eligible = kinds >= 0
    if taken is not None:
        is_eligible &= tl.load(taken + rows, mask=is_row, other=0) != 0
    first = tl.load(groups + kinds * 3, mask=is_eligible, other=0)
    count = tl.load(groups + kinds * 3 + 1, mask=is_eligible, other=0)
    router = tl.load(groups + kinds * 3 + 2, mask=is_eligible, other=-1)
    code = tl.load(policy + rows, mask=is_row, other=-1).to(tl.int32)[None, :]

    experts = tl.arange(0, E_PAD)
    number = experts[:, None] - first[None, :]
    inside = is_eligible[None, :] & (number >= 0) & (number < count[None, :])
    is_routed = inside & (router >= 0)[None, :]
    entries = rows[None, :] * S + number
    main_logit = tl.load(logits + entries, mask=is_routed, other=0.0)
    auxiliary = tl.zeros_like(main_logit)
    is_causal = is_routed & (code == _CAUSAL)
    for start in range(0, num_slices, BLOCK_A):
        slices = start + tl.arange(0, BLOCK_A)
        at = slices[:, None, None] * (num_rows * S) + entries[None, :, :]
        mask = (slices < num_slices)[:, None, None] & is_causal[None, :, :]
        auxiliary += tl.sum(tl.load(partials + at, mask=mask, other=0.0), axis=0)

    threshold = tl.load(thresholds + experts, mask=experts < E, other=0.0)
    selected = (code == _CAUSAL) & (auxiliary > 0)
    selected |= (code == _CALIBRATED) & (main_logit > threshold[:, None])
    selected |= (code == _THRESHOLD) & (main_logit > 0)
    if chosen is not None:
        is_choice = is_routed & (code == _EXPERT_CHOICE)
        where = rows[None, :] * E + experts[:, None]
        selected |= tl.load(chosen + where, mask=is_choice, other=0) != 0
    selected = inside & (selected | (router < 0)[None, :])
    return selected, tl.where(is_routed, tl.sigmoid(main_logit), 1.0)


@kernel_for_any("num_rows", "num_slices")
def list_pairs(
    modality: tl.tensor,
    policy: tl.tensor,
    taken: tl.tensor,
    chosen: tl.tensor,
    thresholds: tl.tensor,
    groups: tl.tensor,
    logits: tl.tensor,
    partials: tl.tensor,
    flags: tl.tensor,
    counts: tl.tensor,
    tokens: tl.tensor,
    weights: tl.tensor,
    offsets: tl.tensor,
    places: tl.tensor,
    num_rows: tl.tensor,
    num_slices: tl.tensor,
    S: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
    IS_ALL: tl.constexpr,
) -> None:
    """Grid [row tiles]: selects; with IS_ALL there is one tile, and the pairs are written.

    Otherwise flags float32 [E, T] gets the weight of each pair or -1, counts int32 [E, tiles].
    """
    tile = tl.program_id(0)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = rows < num_rows
    experts = tl.arange(0, E_PAD)
    selected, weight = select_tile(
        rows,
        modality,
        policy,
        taken,
        chosen,
        thresholds,
        groups,
        logits,
        partials,
        num_rows,
        num_slices,
        S,
        E,
        E_PAD,
        BLOCK_A,
    )
    is_expert = experts < E
    found = selected.to(tl.int32)
    num_found = tl.sum(found, axis=1)
    if IS_ALL:
        starts = tl.cumsum(num_found, axis=0) - num_found
        pair = starts[:, None] + tl.cumsum(found, axis=1) - found
        tl.store(tokens + pair, rows[None, :] + tl.zeros_like(pair), mask=selected)
        tl.store(weights + pair, weight, mask=selected)
        is_place = is_expert[:, None] & is_row[None, :]
        where = rows[None, :] * E + experts[:, None]
        tl.store(places + where, tl.where(selected, pair, -1), mask=is_place)
        tl.store(offsets + experts, starts, mask=is_expert)
        tl.store(offsets + E, tl.sum(num_found, axis=0))
    else:
        where = experts[:, None] * num_rows + rows[None, :]
        is_place = is_expert[:, None] & is_row[None, :]
        tl.store(flags + where, tl.where(selected, weight, -1.0), mask=is_place)
        tl.store(counts + experts * tl.num_programs(0) + tile, num_found, mask=is_expert)


@kernel_for_any("num_rows")
def write_pairs(
    flags: tl.tensor,
    counts: tl.tensor,
    tokens: tl.tensor,
    weights: tl.tensor,
    offsets: tl.tensor,
    places: tl.tensor,
    num_rows: tl.tensor,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILES_PAD: tl.constexpr,
) -> None:
    """Grid [row tiles]: writes the pairs that `list_pairs` counted."""
    tile = tl.program_id(0)
    num_tiles = tl.num_programs(0)
    experts = tl.arange(0, E_PAD)
    is_expert = experts < E
    tiles = tl.arange(0, TILES_PAD)
    mask = is_expert[:, None] & (tiles < num_tiles)[None, :]
    found = tl.load(counts + experts[:, None] * num_tiles + tiles[None, :], mask=mask, other=0)
    totals = tl.sum(found, axis=1)
    starts = tl.cumsum(totals, axis=0) - totals
    before = starts + tl.sum(tl.where((tiles < tile)[None, :], found, 0), axis=1)

    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    is_place = is_expert[:, None] & (rows < num_rows)[None, :]
    at = experts[:, None] * num_rows + rows[None, :]
    weight = tl.load(flags + at, mask=is_place, other=-1.0)
    selected = weight != -1.0  # a weight may be NaN, which is to end its own request alone
    mine = selected.to(tl.int32)
    pair = before[:, None] + tl.cumsum(mine, axis=1) - mine
    tl.store(tokens + pair, rows[None, :] + tl.zeros_like(pair), mask=selected)
    tl.store(weights + pair, weight, mask=selected)
    where = rows[None, :] * E + experts[:, None]
    tl.store(places + where, tl.where(selected, pair, -1), mask=is_place)
    if tile == 0:
        tl.store(offsets + experts, starts, mask=is_expert)
        tl.store(offsets + E, tl.sum(totals, axis=0))
