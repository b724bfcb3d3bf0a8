"""Routers: scores, and the selection of each row under its own policy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from momaserve.kernels.cpu.jit import kernel
from momaserve.kernels.cpu.linear import linear, linear_threaded
from momaserve.kernels.cpu.scalar import sigmoid
from momaserve.kernels.cpu.tile import TILE


@register_jitable
def _dot(x: Any, t: int, w: Any, o: int) -> Any:
    total = np.float32(0)
    for i in range(w.shape[1]):
        total += w[o, i] * x[t, i]
    return total


@kernel
def scores(x: Any, rows: Any, w: Any, logits: Any, weights: Any) -> None:
    """Main router: logits [R, E] = x [T, D] at rows int64 [R], times w [E, D]; their sigmoids."""
    for r in range(len(rows)):
        for e in range(w.shape[0]):
            logits[r, e] = _dot(x, rows[r], w, e)
            weights[r, e] = sigmoid(logits[r, e])


@kernel
def auxiliary(x: Any, rows: Any, fc1: Any, fc2: Any, threads: bool, out: Any) -> None:
    """out [R, E] = fc2 @ silu(fc1 @ x) of the rows; fc1 is packed, fc2 is [E, A]."""
    hidden = np.empty((len(rows), fc1.shape[0] * TILE), np.float32)
    if threads:
        linear_threaded(x, rows, fc1, hidden)
    else:
        linear(x, rows, fc1, hidden)
    for r in range(len(rows)):
        for i in range(fc2.shape[1]):
            hidden[r, i] *= sigmoid(hidden[r, i])
        for e in range(fc2.shape[0]):
            out[r, e] = _dot(hidden, r, fc2, e)


@kernel
def select(scores: Any, thresholds: Any, policies: Any, rows: Any, policy: int, out: Any) -> None:
    """out bool [R, E] = scores [R, E] > thresholds [E], at the rows that have this policy.

    policies is int8 [T], rows int64 [R] into it.
    """
    for r in range(len(rows)):
        if policies[rows[r]] == policy:
            for e in range(scores.shape[1]):
                out[r, e] = scores[r, e] > thresholds[e]


@kernel
def count(selected: Any, counts: Any) -> None:
    """Add up selected, bool [R, E]: rows of each expert, then rows with 0, 1, ... E experts.

    counts is int64 [2 E + 1], zeros.
    """
    num_experts = selected.shape[1]
    for r in range(selected.shape[0]):
        size = 0
        for e in range(num_experts):
            if selected[r, e]:
                counts[e] += 1
                size += 1
        counts[num_experts + size] += 1
