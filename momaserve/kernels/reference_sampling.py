"""Draws from rows of logits in plain torch: what the kernels must match.

Numbers and filters are those of `runner.sampler.Sampler`: temperature, top-k, top-p, min-p in this
order, then an inverse-CDF draw over ids, or over ranks where a filter ranks them. Letters: S rows,
V ids, C masks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw(
    logits: Tensor,
    masks: Tensor,
    choices: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One id per row among those that its mask allows.

    Args:
        logits: float32 [S, V].
        masks: bool [C, V], which ids each kind of choice allows, at least one.
        choices: int32 [S], the mask of each row.
        temperature: float64 [S]; 0 takes the best, the lower id of equals.
        top_k: int32 [S], 0 keeps all.
        top_p, min_p: float64 [S], in (0, 1] and [0, 1].
        uniforms: float64 [S], in [0, 1).
        bias: float32 [S, V], added to the logits; a row whose every id it bans does without it.

    Returns:
        int64 [S], and bool [S], whether all logits of the row are finite. Of a row that is not,
        the id is the lowest allowed one.
    """
    is_finite = logits.isfinite().all(-1)
    allowed = masks[choices.long()]
    ids = [
        _draw_row(
            logits[row],
            allowed[row],
            None if bias is None else bias[row],
            float(temperature[row]),
            int(top_k[row]),
            float(top_p[row]),
            float(min_p[row]),
            float(uniforms[row]),
        )
        if is_finite[row]
        else int(allowed[row].nonzero()[0])
        for row in range(len(logits))
    ]
    return torch.tensor(ids, dtype=torch.int64, device=logits.device), is_finite


def _draw_row(
    logits: Tensor,
    allowed: Tensor,
    bias: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
) -> int:
    scores = logits.masked_fill(~allowed, float("-inf"))
    if bias is not None and bool((scores + bias > float("-inf")).any()):
        scores = scores + bias
    best = scores.max()
    if temperature == 0:
        return int((scores == best).nonzero()[0])
    scaled = (scores - best).double() / max(temperature, 1e-300)
    ids = torch.arange(len(scores), device=scores.device)
    if top_k:
        ids = scores.sort(descending=True, stable=True).indices[:top_k]
    elif top_p < 1:
        ids = scaled.sort(descending=True, stable=True).indices
    weights = scaled[ids].exp()
    if top_p < 1:
        cumulative = weights.cumsum(0)
        weights[cumulative - weights >= top_p * cumulative[-1]] = 0.0
    weights[weights < min_p] = 0.0
    cumulative = weights.cumsum(0)
    wanted = uniform * cumulative[-1:]
    index = torch.searchsorted(cumulative, wanted, right=True).clamp_max(len(ids) - 1)
    return int(ids[index])
