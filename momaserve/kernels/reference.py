"""The engine's arithmetic in plain torch: runs anywhere, and is the oracle of every kernel.

Letters as in `momaserve.models.config`: T tokens, D hidden, H query heads, G kv heads, K head
dim, E experts, F expert hidden. Statistics, angles and scores are float32 whatever the inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BATCHED_ROWS = 64
"""Equal shares of at least this many rows are computed for all experts at once."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / sqrt(mean(x^2) + eps) * weight [D], computed in float32, in x's dtype."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def head_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the head dim: x [..., H, K], weight and bias [H, K] (Chameleon's QK-norm)."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * weight.float() + bias.float()).to(x.dtype)


def rope_table(num_positions: int, head_dim: int, theta: float) -> Tensor:
    """cos and sin of the angles of every position: float32 [num_positions, 2, K/2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), theta**-exponent)
    return torch.stack((angles.cos(), angles.sin()), dim=1).float()


def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate-half RoPE: x [T, H, K], angles [T, 2, K/2] (rows of `rope_table`)."""
    cos, sin = angles[:, 0].unsqueeze(-2), angles[:, 1].unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def router_hidden(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """Auxiliary router: logits = fc2 @ silu(fc1 @ x); x [T, D], fc1 [A, D], fc2 [E, A]."""
    return F.linear(F.silu(F.linear(x.float(), fc1.float())), fc2.float())


def expert_choice(
    logits: Tensor, eligible: Tensor, segments: Tensor, num_segments: int, capacity: float | None
) -> Tensor:
    """Each expert takes the best `k = max(1, floor(b * capacity))` tokens of each segment.

    Source: Zhou et al., 2202.09368, with the scope and rounding of model.md, section 4.

    `b` counts the segment's eligible tokens. Ties go to the lower token index.

    Args:
        logits: [T, E] scores.
        eligible: bool [T], tokens that may be taken at all.
        segments: int64 [T], the scope of each token (one request's prompt); -1 is none.
        num_segments: segments are numbered from 0 to this, exclusive.
        capacity: share of the tokens that one expert takes; None is exactly 1 / E.

    Returns:
        bool [T, E].
    """
    inside = eligible & (segments >= 0)
    # Tokens outside every scope go to a segment of their own, at the end.
    scope = torch.where(inside, segments, num_segments)
    best_first = logits.float().sort(dim=0, descending=True, stable=True).indices
    by_segment = scope[best_first].sort(dim=0, stable=True).indices
    order = best_first.gather(0, by_segment)  # [T, E]: by segment, then by score
    # Not bincount, which waits for the device.
    counts = scope.new_zeros(num_segments + 1).index_add_(0, scope, torch.ones_like(scope))
    starts = counts.cumsum(0) - counts
    ordered_scope = scope[order]
    rank = torch.arange(len(scope), device=scope.device).unsqueeze(1) - starts[ordered_scope]
    limit = counts // logits.shape[1] if capacity is None else (counts.double() * capacity).long()
    taken = rank < limit.clamp_min(1)[ordered_scope]
    selected = torch.zeros_like(taken).scatter_(0, order, taken)
    return selected & inside.unsqueeze(1)


def routed_experts(
    u: Tensor, selected: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """Weighted sum of SwiGLU experts over the selected (token, expert) pairs.

    Args:
        u: [T, D] what the experts read.
        selected: bool [T, E].
        weights: float32 [T, E] routing weights (the main router's affinities).
        gate, up: [E, F, D].
        down: [E, D, F].

    Returns:
        float32 [T, D]; zero for a token without expert.
    """
    out = torch.zeros(u.shape, dtype=torch.float32, device=u.device)
    experts, tokens = selected.t().nonzero(as_tuple=True)
    counts = torch.bincount(experts, minlength=selected.shape[1]).tolist()
    rows, scale = u[tokens], weights[tokens, experts].unsqueeze(1)
    if counts[0] >= BATCHED_ROWS and min(counts) == max(counts):
        # Expert choice over a whole batch: equal shares, so one batched product each.
        x = rows.view(len(counts), counts[0], -1)
        hidden = F.silu(x @ gate.transpose(1, 2)) * (x @ up.transpose(1, 2))
        y = (hidden @ down.transpose(1, 2)).flatten(0, 1).float() * scale
        return out.index_add(0, tokens, y)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        pairs = slice(start, start + count)
        start += count
        x = rows[pairs]
        hidden = F.silu(F.linear(x, gate[expert])) * F.linear(x, up[expert])
        y = F.linear(hidden, down[expert]).float() * scale[pairs]
        out.index_add_(0, tokens[pairs], y)
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention with grouped kv heads.

    Args:
        q: [B, Sq, H, K].
        k, v: [B, Sk, G, K].
        mask: bool, broadcastable to [B, H, Sq, Sk]; True is visible. None with `is_causal`.

    Returns:
        [B, Sq, H, K].
    """
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
