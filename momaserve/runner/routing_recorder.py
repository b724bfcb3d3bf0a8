"""Remembers what a step's routers selected: counts for metrics, and experts of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from momaserve.layers.batch import ForwardBatch
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.outputs import TokenRouting


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingCounts:
    """How the experts and depth-routed layers of one step were used."""

    expert_tokens: tuple[tuple[int, str, tuple[int, ...]], ...]
    """(layer, group, tokens per expert)."""
    group_tokens: tuple[tuple[int, str, int], ...]
    """(layer, group, tokens that its router saw)."""
    experts_per_token: dict[str, tuple[int, ...]]
    """By group: (token, layer) pairs with 0, 1, ... E experts."""
    depth_tokens: tuple[tuple[int, int, int], ...]
    """(layer, taken, skipped)."""


NO_COUNTS = RoutingCounts(expert_tokens=(), group_tokens=(), experts_per_token={}, depth_tokens=())


class RoutingRecorder:
    """Keeps a step's selections on the device until the step has run. A `RoutingObserver`."""

    def __init__(self) -> None:
        self._experts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        self._depth: list[tuple[int, Tensor, Tensor]] = []

    def experts(
        self, layer: int, group: str, u: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        self._experts.setdefault(group, []).append((layer, eligible, selected))

    def depth(self, layer: int, x: Tensor, logits: Tensor, eligible: Tensor, taken: Tensor) -> None:
        self._depth.append((layer, eligible, taken))

    def counts(self) -> RoutingCounts:
        expert_tokens: list[tuple[int, str, tuple[int, ...]]] = []
        group_tokens: list[tuple[int, str, int]] = []
        per_token: dict[str, tuple[int, ...]] = {}
        for group, entries in self._experts.items():
            selected = torch.stack([entry[2] for entry in entries])  # [L, T, E]
            eligible = torch.stack([entry[1] for entry in entries])  # [L, T]
            num_experts = selected.shape[2]
            loads = selected.sum(1).tolist()
            expert_tokens += [
                (entry[0], group, tuple(load)) for entry, load in zip(entries, loads, strict=True)
            ]
            counts = eligible.sum(1).tolist()
            group_tokens += [
                (entry[0], group, count) for entry, count in zip(entries, counts, strict=True)
            ]
            fanout = selected.sum(2)[eligible]
            per_token[group] = tuple(torch.bincount(fanout, minlength=num_experts + 1).tolist())
        depth: list[tuple[int, int, int]] = []
        if self._depth:
            taken = torch.stack([entry[2] for entry in self._depth]).sum(1).tolist()
            routed = torch.stack([entry[1] for entry in self._depth]).sum(1).tolist()
            depth = [
                (entry[0], took, total - took)
                for entry, took, total in zip(self._depth, taken, routed, strict=True)
            ]
        return RoutingCounts(
            expert_tokens=tuple(expert_tokens),
            group_tokens=tuple(group_tokens),
            experts_per_token=per_token,
            depth_tokens=tuple(depth),
        )

    def trace(self, batch: ForwardBatch, rows: Sequence[int]) -> RoutingTrace:
        """The selections of single rows of the batch that was recorded; waits for nothing."""
        index = torch.tensor(rows, dtype=torch.int64, device=batch.token_ids.device)
        return RoutingTrace(
            token_ids=batch.token_ids[index],
            modality=batch.modality[index],
            selected={
                group: {layer: selected[index] for layer, _, selected in entries}
                for group, entries in self._experts.items()
            },
            skipped={layer: (eligible & ~taken)[index] for layer, eligible, taken in self._depth},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTrace:
    """Selections of R tokens, still on the device."""

    token_ids: Tensor
    """int64 [R]."""
    modality: Tensor
    """int8 [R]."""
    selected: dict[str, dict[int, Tensor]]
    """By group and layer: bool [R, E]. Groups of one expert route nothing and are not here."""
    skipped: dict[int, Tensor]
    """By depth-routed layer: bool [R]."""

    def entries(self, config: ModelConfig) -> list[TokenRouting]:
        """What each token used; waits until the step has run."""
        group_of = {m: group.name for group in config.expert_groups for m in group.modalities}
        selected = {
            group: {layer: chosen.tolist() for layer, chosen in layers.items()}
            for group, layers in self.selected.items()
        }
        skipped = {layer: passed.tolist() for layer, passed in self.skipped.items()}
        entries: list[TokenRouting] = []
        modalities = self.modality.tolist()
        for row, token_id in enumerate(self.token_ids.tolist()):
            group = group_of[Modality(modalities[row])]
            routed = selected.get(group, {})
            experts: list[tuple[int, ...] | None] = []
            for layer in range(config.num_hidden_layers):
                if layer in skipped and skipped[layer][row]:
                    experts.append(None)
                elif layer in routed:
                    experts.append(tuple(i for i, used in enumerate(routed[layer][row]) if used))
                else:
                    experts.append((0,))
            entries.append(TokenRouting(token_id, group, tuple(experts)))
        return entries
