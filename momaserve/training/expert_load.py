"""How well the experts of a training batch are used.

Under expert choice every expert of a group takes equally many tokens by construction, so the
load says nothing. What can go wrong is elsewhere: tokens that nobody takes, and affinities that
fall towards zero, which switches the experts off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.training.forward import modalities_of
from momaserve.training.packing import PackedRows


class ExpertLoad:
    """A `RoutingObserver` that sums over layers, padding left out."""

    def __init__(self, config: ModelConfig, rows: PackedRows) -> None:
        modality = modalities_of(config, rows.token_ids.flatten())
        real = ~rows.is_padding.flatten()
        self._masks = {m.label: real & (modality == int(m)) for m in Modality}
        self._sums = {
            m.label: torch.zeros(4, dtype=torch.float64, device=real.device) for m in Modality
        }

    @torch.no_grad()
    def experts(
        self, layer: int, group: str, u: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        affinity = logits.sigmoid()
        for name, mask in self._masks.items():
            mine = eligible & mask
            chosen = selected & mine.unsqueeze(1)
            sums = (
                mine.sum(),
                (mine & ~chosen.any(1)).sum(),
                chosen.sum(),
                (affinity * chosen).sum(),
            )
            self._sums[name] += torch.stack([value.double() for value in sums])

    def depth(self, layer: int, x: Tensor, logits: Tensor, eligible: Tensor, taken: Tensor) -> None:
        """Depth routers take their share by construction."""

    def report(self) -> dict[str, float]:
        """By modality: the share of tokens without expert, the mean affinity of selected pairs.

        A modality without tokens, or served by one expert, has no entries.
        """
        found: dict[str, float] = {}
        for name, sums in self._sums.items():
            tokens, without, pairs, affinity = sums.tolist()
            if tokens:
                found[f"{name}_without_expert"] = without / tokens
            if pairs:
                found[f"{name}_affinity"] = affinity / pairs
        return found
