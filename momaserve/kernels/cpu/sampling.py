"""Draws from rows of logits, for rows whose candidates need no sorting."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from momaserve.kernels.cpu.jit import kernel
from momaserve.kernels.cpu.scalar import exp32

_LEAST = -(2**31)


@register_jitable
def _best(row: Any, mask: Any) -> int:
    """The largest of `row` that the mask allows, the first of equals; none is NaN."""
    largest = np.int32(_LEAST)
    for i in range(len(row)):
        bits = np.float32(row[i]).view(np.int32)
        # As integers they have the order of the floats, and what is larger is found without
        # branches: a loop over floats would keep to their order for the sake of NaN.
        order = bits ^ np.int32((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
        largest = max(largest, order if mask[i] else np.int32(_LEAST))
    bits = np.int32(largest ^ np.int32((largest >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    value = bits.view(np.float32)
    for i in range(len(row)):
        if row[i] == value and mask[i]:  # 0 equals -0
            return i
    return -1


@register_jitable
def _draw_row(
    row: Any, mask: Any, temperature: float, min_p: float, uniform: float, weights: Any
) -> int:
    """The id of a row of logits, finite or -inf; -1 if all that the mask allows are -inf.

    Args:
        weights: float32 [V], overwritten.
    """
    best_id = _best(row, mask)
    best = row[best_id]
    if best == -np.inf:
        return -1
    if temperature == 0:
        return best_id
    inverse, least = 1.0 / temperature, np.float32(min_p)
    for i in range(len(row)):
        scaled = np.float32(max(float(row[i] - best) * inverse, -1e4))
        weight = exp32(scaled) if scaled > np.float32(-87) else np.float32(0)
        weights[i] = weight if mask[i] and weight >= least else np.float32(0)
    mass = 0.0
    for i in range(len(row)):
        mass += weights[i]
    wanted, passed = uniform * mass, 0.0
    for i in range(len(row)):
        passed += weights[i]
        if passed > wanted:
            return i
    return best_id


@kernel
def draw(
    logits: Any,
    rows: Any,
    masks: Any,
    choices: Any,
    temperatures: Any,
    min_ps: Any,
    uniforms: Any,
    bias_starts: Any,
    bias_ids: Any,
    biases: Any,
    token_ids: Any,
    is_finite: Any,
) -> None:
    """Inverse-CDF draw of one token per row among those that its mask allows.

    Args:
        logits: float32 [S, V]; changed while a row is drawn, and as they were afterwards. A row
            that is not finite is drawn as if it were 0.
        rows: int64 [R], the rows to draw.
        masks: bool [C, V]; choices: int64 [R], the mask of each.
        temperatures, min_ps, uniforms: float64 [R]; a temperature of 0 takes the best, the lower
            id of equals. Weights are relative to the best token's 1; those below min_p are cut.
        bias_starts: int64 [R + 1], where each row begins in bias_ids int64 and biases float32,
            which are added to its logits; a row that has nothing left then keeps them as they are.
        token_ids, is_finite: int64 and bool [S], written at the rows.
    """
    size = logits.shape[1]
    weights = np.empty(size, np.float32)
    before = np.empty(len(bias_ids), np.float32)
    for r in range(len(rows)):
        row, mask = logits[rows[r]], masks[choices[r]]
        total = np.float32(0)
        for i in range(size):
            total += np.float32(0) * row[i]  # 0, or NaN if anything is not finite
        is_finite[rows[r]] = total == np.float32(0)
        if not is_finite[rows[r]]:
            row = np.zeros(size, np.float32)
        start, stop = bias_starts[r], bias_starts[r + 1]
        for j in range(start, stop):
            before[j] = row[bias_ids[j]]
            row[bias_ids[j]] += biases[j]
        token_id = _draw_row(row, mask, temperatures[r], min_ps[r], uniforms[r], weights)
        for j in range(stop - 1, start - 1, -1):  # an id may be there twice
            row[bias_ids[j]] = before[j]
        if token_id < 0:
            token_id = _draw_row(row, mask, temperatures[r], min_ps[r], uniforms[r], weights)
        token_ids[rows[r]] = token_id
