"""One transformer block: attention, experts, their norms, and the optional depth router."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from momaserve.kernels import reference
from momaserve.layers.attention import SelfAttention
from momaserve.layers.batch import ForwardBatch
from momaserve.layers.experts import ExpertLayer
from momaserve.layers.routing import Router
from momaserve.modality import Modality


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return reference.rms_norm(x, self.weight, self.eps)


class DepthRouter(nn.Module):
    """Chooses which tokens a layer computes; the others pass unchanged (mixture of depths)."""

    def __init__(
        self,
        hidden_size: int,
        aux_hidden_size: int,
        capacity: float,
        modalities: tuple[Modality, ...],
    ) -> None:
        super().__init__()
        self.modalities = modalities
        self.router = Router(hidden_size, aux_hidden_size, 1, capacity)

    def forward(self, layer: int, x: Tensor, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """x [T, D] -> taken bool [T], weight float32 [T] (1 for tokens that never route)."""
        routed = torch.zeros_like(batch.modality, dtype=torch.bool)
        for modality in self.modalities:
            routed = routed | (batch.modality == int(modality))
        logits = self.router.scores(x)
        selected = self.router.select(x, logits, routed, batch.routing)
        if batch.routing.rule is not None:
            selected = batch.routing.rule(layer, "depth", x, logits, routed, selected)
        taken = selected.squeeze(1)
        if batch.observer is not None:
            batch.observer.depth(layer, x, logits.squeeze(1), routed, taken)
        weight = torch.where(routed, logits.squeeze(1).sigmoid(), 1.0)
        return taken | ~routed, weight


class Block(nn.Module):
    """`norm_order` "post": x + norm(f(x)); "pre": x + f(norm(x)) (model.md, section 2)."""

    def __init__(
        self,
        *,
        norm_order: str,
        attention: SelfAttention,
        experts: ExpertLayer,
        attn_norm: RMSNorm,
        ffn_norm: RMSNorm,
        depth_router: DepthRouter | None,
    ) -> None:
        super().__init__()
        self.is_post_norm = norm_order == "post"
        self.self_attn = attention
        self.experts = experts
        self.attn_norm = attn_norm
        self.ffn_norm = ffn_norm
        self.depth_router = depth_router

    def forward(self, layer: int, x: Tensor, angles: Tensor, batch: ForwardBatch) -> Tensor:
        """x [T, D], angles [T, 2, K/2] -> [T, D]."""
        if self.depth_router is None:
            return self.compute(layer, x, angles, None, batch)
        taken, weight = self.depth_router(layer, x, batch)
        y = self.compute(layer, x, angles, taken, batch)
        wide, scale = x.float(), weight.unsqueeze(1)
        routed = torch.where(scale == 1, y, (wide + scale * (y.float() - wide)).to(x.dtype))
        return torch.where(taken.unsqueeze(1), routed, x)

    def compute(
        self, layer: int, x: Tensor, angles: Tensor, taken: Tensor | None, batch: ForwardBatch
    ) -> Tensor:
        """The block itself over the taken tokens; rows of the others are meaningless."""
        if self.is_post_norm:
            h = x + self.attn_norm(self.self_attn(layer, x, angles, taken, batch))
            out: Tensor = h + self.ffn_norm(self.experts(layer, h, taken, batch))
            return out
        h = x + self.self_attn(layer, self.attn_norm(x), angles, taken, batch)
        out = h + self.experts(layer, self.ffn_norm(h), taken, batch)
        return out
