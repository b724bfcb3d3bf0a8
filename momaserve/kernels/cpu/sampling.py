"""Draws from rows of logits, for rows whose candidates need no sorting."""

from __future__ import annotations

from typing import Any

import numpy as np

from momaserve.kernels.cpu.jit import kernel
from momaserve.kernels.cpu.scalar import exp32


@kernel
def draw(
    logits: Any,
    rows: Any,
    masks: Any,
    choices: Any,
    temperatures: Any,
    min_ps: Any,
    uniforms: Any,
    token_ids: Any,
    is_finite: Any,
) -> None:
    """Inverse-CDF draw of one token per row among those that its mask allows.

    Args:
        logits: float32 [S, V]; a row that is not finite is drawn as if it were 0.
        rows: int64 [R], the rows to draw.
        masks: bool [C, V]; choices: int64 [R], the mask of each.
        temperatures, min_ps, uniforms: float64 [R]; a temperature of 0 takes the best, the lower
            id of equals. Weights are relative to the best token's 1; those below min_p are cut.
        token_ids, is_finite: int64 and bool [S], written at the rows.
    """
    size = logits.shape[1]
    weights = np.empty(size, np.float32)
    for r in range(len(rows)):
        row, mask = logits[rows[r]], masks[choices[r]]
        total = np.float32(0)
        for i in range(size):
            total += np.float32(0) * row[i]  # 0, or NaN if anything is not finite
        finite = total == np.float32(0)
        is_finite[rows[r]] = finite
        best, best_id = np.float32(-np.inf), -1
        for i in range(size):
            value = row[i] if finite else np.float32(0)
            if mask[i] and (best_id < 0 or value > best):
                best, best_id = value, i
        token_ids[rows[r]] = best_id
        if temperatures[r] == 0:
            continue
        inverse, least = 1.0 / temperatures[r], np.float32(min_ps[r])
        for i in range(size):
            value = row[i] if finite else np.float32(0)
            scaled = np.float32(max(float(value - best) * inverse, -1e4))
            weight = exp32(scaled) if scaled > np.float32(-87) else np.float32(0)
            weights[i] = weight if mask[i] and weight >= least else np.float32(0)
        mass = 0.0
        for i in range(size):
            mass += weights[i]
        wanted, passed = uniforms[r] * mass, 0.0
        for i in range(size):
            passed += weights[i]
            if passed > wanted:
                token_ids[rows[r]] = i
                break
