"""Whether a token was drawn rightly, where rounding may put a number on either side of a bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How a row is drawn, as in `reference_sampling.draw`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def draw_error(scores: Tensor, draw: Draw, number: float, token: int) -> float:
    """By how much of all weights a row's random number misses the place of the token drawn.

    Args:
        scores: float32 [V], -inf where the mask allows nothing.
        number: in [0, 1).

    Returns:
        0 for the right token; infinite for one that may not be drawn, or, without temperature,
        is not the first of the best.
    """
    if not 0 <= token < len(scores) or scores[token] == -math.inf:
        return math.inf
    best = scores.max()
    if draw.temperature == 0:
        return 0.0 if token == int((scores == best).nonzero()[0]) else math.inf
    weights = ((scores - best).double() / draw.temperature).exp()
    ids = torch.arange(len(scores), device=scores.device)
    if draw.top_k or draw.top_p < 1:
        ids = scores.sort(descending=True, stable=True).indices
        ids = ids[: draw.top_k] if draw.top_k else ids
        weights = weights[ids]
    found = (ids == token).nonzero()
    if not len(found):
        return math.inf
    if draw.top_p < 1:
        cumulative = weights.cumsum(0)
        weights[cumulative - weights >= draw.top_p * cumulative[-1]] = 0.0
    weights[weights < draw.min_p] = 0.0
    ends = weights.cumsum(0)
    place, wanted, total = int(found[0]), number * float(ends[-1]), float(ends[-1])
    begin = float(ends[place - 1]) if place else 0.0
    return max(begin - wanted, wanted - float(ends[place]), 0.0) / total
