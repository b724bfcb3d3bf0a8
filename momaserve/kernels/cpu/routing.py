"""Routers: scores, auxiliary scores, and the selection of each row under its own policy."""

from __future__ import annotations

from typing import Any

import numpy as np

from momaserve.kernels.cpu.jit import kernel
from momaserve.kernels.cpu.scalar import sigmoid


@kernel
def gather(x: Any, rows: Any, out: Any) -> None:
    """out [R, D] = x [T, D] at rows int64 [R]."""
    for r in range(len(rows)):
        for i in range(x.shape[1]):
            out[r, i] = x[rows[r], i]


@kernel
def small_linear(x: Any, w: Any, out: Any) -> None:
    """out [T, O] = x [T, I] @ w [O, I]^T, float32, for a handful of outputs."""
    for t in range(x.shape[0]):
        for o in range(w.shape[0]):
            total = np.float32(0)
            for i in range(x.shape[1]):
                total += w[o, i] * x[t, i]
            out[t, o] = total


@kernel
def silu(x: Any) -> None:
    """x = x * sigmoid(x), in place."""
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[t, i] *= sigmoid(x[t, i])


@kernel
def affinities(logits: Any, out: Any) -> None:
    """out = sigmoid(logits)."""
    for t in range(logits.shape[0]):
        for i in range(logits.shape[1]):
            out[t, i] = sigmoid(logits[t, i])


@kernel
def select(scores: Any, thresholds: Any, policies: Any, rows: Any, policy: int, out: Any) -> None:
    """out bool [R, E] = scores [R, E] > thresholds [E], at the rows that have this policy.

    policies is int8 [T], rows int64 [R] into it.
    """
    for r in range(len(rows)):
        if policies[rows[r]] == policy:
            for e in range(scores.shape[1]):
                out[r, e] = scores[r, e] > thresholds[e]
