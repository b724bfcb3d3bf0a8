"""Kernels of `sampling`, which has the contract."""

from __future__ import annotations

from typing import Any

from momaserve.kernels.triton.jit import kernel, tl

_LEAST = tl.constexpr(-(2**31) + 1)
_NO_WEIGHT = tl.constexpr(-1e4)
_ALL_DISTANCE = tl.constexpr(1e30)


@kernel
def _scores(
    logits: tl.tensor,
    bias: tl.tensor,
    has_bias: tl.tensor,
    mask: tl.tensor,
    at: tl.tensor,
    size: tl.tensor,
) -> Any:
    """Masked and biased scores of a row at ids, -inf where not allowed; bias may be None."""
    inside = at < size
    allowed = tl.load(mask + at, mask=inside, other=0) != 0
    score = tl.load(logits + at, mask=inside, other=0.0)
    if bias is not None:
        score += tl.where(has_bias, tl.load(bias + at, mask=inside, other=0.0), 0.0)
    return tl.where(allowed, score, float("-inf"))


@kernel
def _weights(
    scores: tl.tensor,
    best: tl.tensor,
    inverse: tl.tensor,
) -> Any:
    """float32 weights, 1 for the best, 0 for what is not allowed."""
    scaled = tl.maximum((scores - best).to(tl.float64) * inverse, _NO_WEIGHT)
    return tl.exp(scaled.to(tl.float32))


@kernel
def _order(
    values: tl.tensor,
) -> Any:
    """int32 that increase with float32 values; -0 is 0."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@kernel
def survey(
    logits: tl.tensor,
    bias: tl.tensor,
    masks: tl.tensor,
    choices: tl.tensor,
    bests: tl.tensor,
    best_ids: tl.tensor,
    finites: tl.tensor,
    logits_stride: tl.tensor,
    masks_stride: tl.tensor,
    size: tl.tensor,
    SLICE: tl.constexpr,
) -> None:
    """Grid [S, slices]: best score of a slice and its id, with bias and without; finiteness.

    bests float32 and best_ids int32 [2, S, slices], finites int8 [S, slices].
    """
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1)
    place = row * tl.num_programs(1) + number
    half = tl.num_programs(0) * tl.num_programs(1)
    at = number * SLICE + tl.arange(0, SLICE)
    values = tl.load(logits + row * logits_stride + at, mask=at < size, other=0.0)
    is_finite = (values - values) == 0.0
    tl.store(finites + place, tl.min(is_finite.to(tl.int32), axis=0).to(tl.int8))
    mask = masks + tl.load(choices + row).to(tl.int64) * masks_stride
    allowed = tl.load(mask + at, mask=at < size, other=0) != 0
    scores = tl.where(allowed & is_finite, values, float("-inf"))
    best = tl.max(scores, axis=0)
    tl.store(bests + half + place, best)
    tl.store(best_ids + half + place, tl.min(tl.where(scores == best, at, size), axis=0))
    if bias is not None:
        scores += tl.load(bias + row * size + at, mask=at < size, other=0.0)
        best = tl.max(scores, axis=0)
        tl.store(bests + place, best)
        tl.store(best_ids + place, tl.min(tl.where(scores == best, at, size), axis=0))


@kernel
def _best(
    bests: tl.tensor,
    best_ids: tl.tensor,
    place: tl.tensor,
    num_slices: tl.tensor,
    PAD: tl.constexpr,
) -> Any:
    """Best score of a row's slices and the lowest id that has it."""
    numbers = tl.arange(0, PAD)
    parts = tl.load(bests + place + numbers, mask=numbers < num_slices, other=float("-inf"))
    ids = tl.load(best_ids + place + numbers, mask=numbers < num_slices, other=0x7FFFFFFF)
    best = tl.max(parts, axis=0)
    return best, tl.min(tl.where(parts == best, ids, 0x7FFFFFFF), axis=0)


@kernel
def _state(
    bias: tl.tensor,
    bests: tl.tensor,
    best_ids: tl.tensor,
    row: tl.tensor,
    num_rows: tl.tensor,
    num_slices: tl.tensor,
    PAD: tl.constexpr,
) -> Any:
    """(best score, its id, whether the bias counts) of a row."""
    place = row * num_slices
    best, best_id = _best(bests, best_ids, num_rows * num_slices + place, num_slices, PAD)
    has_bias = best != best  # False
    if bias is not None:
        biased, biased_id = _best(bests, best_ids, place, num_slices, PAD)
        has_bias = biased > float("-inf")
        best = tl.where(has_bias, biased, best)
        best_id = tl.where(has_bias, biased_id, best_id)
    return best, best_id, has_bias


@kernel
def weigh(
    logits: tl.tensor,
    bias: tl.tensor,
    masks: tl.tensor,
    choices: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    bests: tl.tensor,
    best_ids: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    logits_stride: tl.tensor,
    masks_stride: tl.tensor,
    size: tl.tensor,
    SLICE: tl.constexpr,
    PAD: tl.constexpr,
    DISTANCES: tl.constexpr,
) -> None:
    """Grid [S, slices]: ids of a slice, and their weight, within each distance from the best.

    counts int32 and sums float64 [S, DISTANCES, slices]; not written for greedy rows. Rows without
    top-k and top-p leave out what is below min-p.
    """
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperature + row)
    if heat == 0:
        return
    number = tl.program_id(1)
    num_slices = tl.num_programs(1)
    best, _, has_bias = _state(bias, bests, best_ids, row, tl.num_programs(0), num_slices, PAD)
    at = number * SLICE + tl.arange(0, SLICE)
    mask = masks + tl.load(choices + row).to(tl.int64) * masks_stride
    bias_row = bias if bias is None else bias + row * size
    scores = _scores(logits + row * logits_stride, bias_row, has_bias, mask, at, size)
    weight = _weights(scores, best, 1.0 / tl.maximum(heat, 1e-300)).to(tl.float64)
    is_plain = (tl.load(top_k + row) == 0) & (tl.load(top_p + row) >= 1.0)
    floor = tl.where(is_plain, tl.load(min_p + row), 0.0)
    weight = tl.where(weight >= floor, weight, 0.0)
    for rung in tl.static_range(DISTANCES):
        inside = _is_within(scores, best, heat, rung, DISTANCES)
        place = (row * DISTANCES + rung) * num_slices + number
        tl.store(counts + place, tl.sum(inside.to(tl.int32), axis=0))
        tl.store(sums + place, tl.sum(tl.where(inside, weight, 0.0), axis=0))


@kernel
def _is_within(
    scores: tl.tensor,
    best: tl.tensor,
    heat: tl.tensor,
    rung: tl.tensor,
    DISTANCES: tl.constexpr,
) -> Any:
    """Whether scores lie within a distance from the best; within the last lie all allowed ones."""
    distance = tl.where(rung == DISTANCES - 1, _ALL_DISTANCE, 2.0 * (rung + 1) * heat)
    return (best - scores).to(tl.float64) <= distance


@kernel
def _entries(
    start: tl.tensor,
    source: tl.tensor,
    LISTED: tl.constexpr,
) -> Any:
    """(order, weight) of LISTED entries from `start` on, of the list or of the row itself.

    source: what to read, as `draw` has it; its last is the number of entries. What lies beyond has
    the least order and no weight.
    """
    is_listed, orders, weights, logits, bias, has_bias, mask, best, inverse, by_score, size = source
    at = start + tl.arange(0, LISTED)
    if is_listed:
        order = tl.load(orders + at, mask=at < size, other=_LEAST)
        weight = tl.load(weights + at, mask=at < size, other=0.0)
    else:
        scores = _scores(logits, bias, has_bias, mask, at, size)
        order = _order(tl.where(by_score, scores, scores - best))
        weight = _weights(scores, best, inverse)
        order = tl.where(at < size, order, _LEAST)
    return order, weight


@kernel
def _above(
    bound: tl.tensor,
    floor: tl.tensor,
    source: tl.tensor,
    LISTED: tl.constexpr,
) -> Any:
    """Of the entries above `bound`: (their number, weight of those of at least `floor`); of those
    at it: (their number, the weight of one); the nearest order that is no higher, the next that is.
    """
    nearest = tl.full((), _LEAST, tl.int64)
    following = bound * 0 + (1 << 40)
    count = bound * 0
    equal = bound * 0
    mass = floor * 0.0
    each = floor * 0.0
    for start in range(0, source[10], LISTED):
        order, weight = _entries(
            start,
            source,
            LISTED,
        )
        wide = order.to(tl.int64)
        weight = weight.to(tl.float64)
        is_above = wide > bound
        is_equal = wide == bound
        count += tl.sum(is_above.to(tl.int64), axis=0)
        equal += tl.sum(is_equal.to(tl.int64), axis=0)
        mass += tl.sum(tl.where(is_above & (weight >= floor), weight, 0.0), axis=0)
        each = tl.maximum(each, tl.max(tl.where(is_equal, weight, 0.0), axis=0))
        nearest = tl.maximum(nearest, tl.max(tl.where(is_above, _LEAST, wide), axis=0))
        following = tl.minimum(following, tl.min(tl.where(is_above, wide, 1 << 40), axis=0))
    return count, mass, equal, each, nearest, following


@kernel
def _lowest(
    low: tl.tensor,
    high: tl.tensor,
    max_count: tl.tensor,
    max_mass: tl.tensor,
    is_strict: tl.tensor,
    floor: tl.tensor,
    source: tl.tensor,
    LISTED: tl.constexpr,
) -> Any:
    """The lowest bound in [low, high] above which lie fewer than `max_count` entries, with no more
    weight than `max_mass`, or less if `is_strict`. High is such a bound; low has an entry or is
    below all."""
    while low < high:
        middle = low + (high - low) // 2
        count, mass, _, _, nearest, following = _above(middle, floor, source, LISTED)
        fits = (count < max_count) & tl.where(is_strict, mass < max_mass, mass <= max_mass)
        # Bounds between two entries are as good as the lower of them.
        high = tl.where(fits, tl.maximum(nearest, low), high)
        low = tl.where(fits, low, following)
    return high


@kernel
def draw(
    logits: tl.tensor,
    bias: tl.tensor,
    masks: tl.tensor,
    choices: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    min_p: tl.tensor,
    uniforms: tl.tensor,
    bests: tl.tensor,
    best_ids: tl.tensor,
    finites: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    orders: tl.tensor,
    weights: tl.tensor,
    ids: tl.tensor,
    token_ids: tl.tensor,
    are_finite: tl.tensor,
    logits_stride: tl.tensor,
    masks_stride: tl.tensor,
    num_slices: tl.tensor,
    size: tl.tensor,
    SLICE: tl.constexpr,
    PAD: tl.constexpr,
    DISTANCES: tl.constexpr,
    LISTED: tl.constexpr,
) -> None:
    """Grid [S]: the id of a row. orders, weights and ids [S, LISTED] are scratch."""
    row = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, PAD)
    is_slice = numbers < num_slices
    finite = tl.load(finites + row * num_slices + numbers, mask=is_slice, other=1).to(tl.int32)
    is_finite = tl.min(finite, axis=0)
    tl.store(are_finite + row, is_finite.to(tl.int8))
    mask = masks + tl.load(choices + row).to(tl.int64) * masks_stride
    if is_finite == 0:
        found = size
        for start in range(0, size, LISTED):
            at = start + tl.arange(0, LISTED)
            allowed = tl.load(mask + at, mask=at < size, other=0) != 0
            found = tl.minimum(found, tl.min(tl.where(allowed, at, size), axis=0))
        tl.store(token_ids + row, found.to(tl.int64))
        return
    best, best_id, has_bias = _state(
        bias, bests, best_ids, row, tl.num_programs(0), num_slices, PAD
    )
    heat = tl.load(temperature + row)
    if heat == 0:
        tl.store(token_ids + row, best_id.to(tl.int64))
        return
    inverse = 1.0 / tl.maximum(heat, 1e-300)
    logits += row * logits_stride
    if bias is not None:
        bias += row * size
    first_k = tl.load(top_k + row).to(tl.int64)
    share = tl.load(top_p + row)
    floor = tl.load(min_p + row)
    uniform = tl.load(uniforms + row)
    rungs = row * DISTANCES * num_slices
    last = rungs + (DISTANCES - 1) * num_slices
    parts = tl.load(sums + last + numbers, mask=is_slice, other=0.0)
    total = tl.sum(parts, axis=0)

    if (first_k == 0) & (share >= 1.0):
        # By id: the slice that the draw falls into, then the id.
        ends = tl.cumsum(parts, axis=0)
        wanted = uniform * total
        last_slice = tl.max(tl.where(parts > 0, numbers, 0), axis=0)
        number = tl.minimum(tl.sum((ends <= wanted).to(tl.int32), axis=0), last_slice)
        wanted -= tl.sum(tl.where(numbers == number - 1, ends, 0.0), axis=0)
        offsets = tl.arange(0, SLICE)
        at = number * SLICE + offsets
        scores = _scores(logits, bias, has_bias, mask, at, size)
        weight = _weights(scores, best, inverse).to(tl.float64)
        weight = tl.where(weight >= floor, weight, 0.0)
        place = tl.sum((tl.cumsum(weight, axis=0) <= wanted).to(tl.int32), axis=0)
        place = tl.minimum(place, tl.max(tl.where(weight > 0, offsets, 0), axis=0))
        tl.store(token_ids + row, (number * SLICE + place).to(tl.int64))
        return

    # List what can matter: the nearest distance that holds enough, if that is few enough.
    rung = tl.full((), -1, tl.int32)
    for step in tl.static_range(DISTANCES):
        there = rungs + step * num_slices + numbers
        near = tl.sum(tl.load(counts + there, mask=is_slice, other=0), axis=0)
        held = tl.sum(tl.load(sums + there, mask=is_slice, other=0.0), axis=0)
        enough = tl.where(first_k > 0, near >= first_k, held >= share * total)
        enough = enough | (step == DISTANCES - 1)
        rung = tl.where((rung < 0) & enough & (near <= LISTED), step, rung)
    is_listed = (rung >= 0).to(tl.int32)
    is_ranked_by_score = first_k > 0
    orders += row * LISTED
    weights += row * LISTED
    ids += row * LISTED
    num_listed = 0
    if is_listed:
        for start in range(0, size, SLICE):
            at = start + tl.arange(0, SLICE)
            scores = _scores(logits, bias, has_bias, mask, at, size)
            inside = _is_within(scores, best, heat, rung, DISTANCES)
            mine = inside.to(tl.int32)
            place = num_listed + tl.cumsum(mine, axis=0) - mine
            order = _order(tl.where(is_ranked_by_score, scores, scores - best))
            tl.store(orders + place, order, mask=inside)
            tl.store(weights + place, _weights(scores, best, inverse), mask=inside)
            tl.store(ids + place, at, mask=inside)
            num_listed += tl.sum(mine, axis=0)
        # Every thread is about to read what others wrote.
        tl.debug_barrier()
    num_entries = tl.where(is_listed != 0, num_listed, size)
    source = (
        is_listed,
        orders,
        weights,
        logits,
        bias,
        has_bias,
        mask,
        best,
        inverse,
        is_ranked_by_score,
        num_entries,
    )

    # A cut is an order and how many of the entries at it are kept, the lowest ids first. Top-k,
    # top-p, the weight that min-p leaves, and the draw, each from the cut of the one before.
    cut = tl.full((), _LEAST, tl.int64)
    top = _order(tl.where(is_ranked_by_score, best, 0.0)).to(tl.int64)
    unlimited = first_k * 0 + (1 << 40)
    kept = unlimited
    number = first_k * 0
    wanted = total * 0.0
    for stage in range(0, 4):
        is_used = (stage >= 2) | ((stage == 0) & (first_k > 0)) | ((stage == 1) & (share < 1.0))
        if is_used:
            least = tl.where(stage >= 2, floor, 0.0)
            max_count = tl.where(stage == 0, first_k, unlimited)
            max_mass = tl.where(stage == 1, share * total, wanted)
            max_mass = tl.where(stage == 0, float("inf"), max_mass)
            high = tl.where(stage == 2, cut, top)
            found = _lowest(cut, high, max_count, max_mass, stage == 1, least, source, LISTED)
            count, mass, equal, each, _, _ = _above(found, least, source, LISTED)
            equal = tl.where(found == cut, tl.minimum(kept, equal), equal)
            fitting = (max_mass - mass) / tl.where(each > 0, each, 1.0)
            if stage == 0:
                kept = tl.minimum(first_k - count, equal)
                total = mass + kept.to(tl.float64) * each
            elif stage == 1:
                fitting = tl.minimum(tl.maximum(tl.ceil(fitting), 1.0), equal.to(tl.float64))
                kept = tl.where(each > 0, fitting.to(tl.int64), equal)
            elif stage == 2:
                kept = equal
                wanted = mass + tl.where(each >= floor, kept.to(tl.float64) * each, 0.0)
                wanted *= uniform
            else:
                fitting = tl.minimum(tl.floor(fitting), (equal - 1).to(tl.float64))
                number = tl.maximum(fitting, 0.0).to(tl.int64)
            cut = found

    # The entry with this number among those of the drawn order; they are in the order of ids.
    passed = number * 0
    token = best_id.to(tl.int64)
    for start in range(0, num_entries, LISTED):
        order, _ = _entries(
            start,
            source,
            LISTED,
        )
        is_equal = order.to(tl.int64) == cut
        mine = is_equal.to(tl.int64)
        rank = passed + tl.cumsum(mine, axis=0) - mine
        passed += tl.sum(mine, axis=0)
        at = start + tl.arange(0, LISTED)
        entry = tl.max(tl.where(is_equal & (rank == number), at, -1), axis=0)
        if entry >= 0:
            token = entry.to(tl.int64)
            if is_listed:
                token = tl.load(ids + entry).to(tl.int64)
    tl.store(token_ids + row, token)
