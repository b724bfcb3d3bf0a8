"""Expert groups: one rule for dense, mixture-of-experts and modality-aware layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from momaserve.kernels import reference
from momaserve.layers.batch import ForwardBatch
from momaserve.layers.routing import Router
from momaserve.modality import Modality


class ExpertGroup(nn.Module):
    """E SwiGLU experts that serve the tokens of some modalities."""

    def __init__(
        self,
        *,
        name: str,
        modalities: tuple[Modality, ...],
        hidden_size: int,
        num_experts: int,
        intermediate_size: int,
        aux_hidden_size: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.name = name
        self.modalities = modalities
        shape = (num_experts, intermediate_size, hidden_size)
        self.gate_proj = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.up_proj = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.down_proj = nn.Parameter(
            torch.empty(num_experts, hidden_size, intermediate_size, dtype=dtype)
        )
        self.router: Router | None = (
            Router(hidden_size, aux_hidden_size, num_experts) if num_experts > 1 else None
        )

    def forward(self, layer: int, u: Tensor, eligible: Tensor, batch: ForwardBatch) -> Tensor:
        """u [T, D], eligible bool [T] -> float32 [T, D], zero where nothing was selected."""
        if self.router is None:
            selected = eligible.unsqueeze(1)
            weights = torch.ones(len(u), 1, device=u.device)
        else:
            logits = self.router.scores(u)
            if batch.routing.noise is not None:
                logits = batch.routing.noise(logits)
            weights = logits.sigmoid()
            selected = self.router.select(u, logits, eligible, batch.routing)
            if batch.routing.rule is not None:
                selected = batch.routing.rule(layer, self.name, u, logits, eligible, selected)
            if batch.observer is not None:
                batch.observer.experts(layer, self.name, u, logits, eligible, selected)
        return reference.routed_experts(
            u, selected, weights, self.gate_proj, self.up_proj, self.down_proj
        )


class ExpertLayer(nn.Module):
    """The feed-forward part of a block: every token goes to the group of its modality."""

    def __init__(self, groups: list[ExpertGroup]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)

    def forward(self, layer: int, u: Tensor, taken: Tensor | None, batch: ForwardBatch) -> Tensor:
        """u [T, D] -> [T, D]; tokens outside `taken` (bool [T]) get zero."""
        out = torch.zeros(u.shape, dtype=torch.float32, device=u.device)
        for group in self.groups:
            assert isinstance(group, ExpertGroup)
            if not batch.modalities.intersection(group.modalities):
                continue
            if len(group.modalities) == len(Modality):
                eligible = torch.ones_like(batch.modality, dtype=torch.bool)
            else:
                eligible = batch.modality == int(group.modalities[0])
            if taken is not None:
                eligible = eligible & taken
            out = out + group(layer, u, eligible, batch)
        return out.to(u.dtype)
