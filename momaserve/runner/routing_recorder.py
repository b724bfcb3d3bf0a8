"""Remembers what a step's routers selected: counts for metrics, and experts of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momaserve.layers.batch import ForwardBatch
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.outputs import TokenRouting
from momaserve.runner.upload import upload


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


Array = NDArray[np.int64]

NO_COUNTS = RoutingCounts(expert_tokens=(), group_tokens=(), experts_per_token={}, depth_tokens=())


class RoutingRecorder:
    """Keeps a step's selections on the device until the step has run. A `RoutingObserver`.

    Where nobody asks for single tokens, a backend may tell it what it has counted itself, instead
    of the selections.
    """

    def __init__(self, *, keeps_rows: bool = True) -> None:
        """
        Args:
            keeps_rows: whether `trace` will be called.
        """
        self.keeps_rows = keeps_rows
        self._experts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
        self._depth: list[tuple[int, Tensor, Tensor]] = []
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] | None = None
        """By group: tokens by layer and expert, tokens by layer, pairs by number of experts."""
        self._depth_sums: tuple[Tensor, Tensor] | None = None
        """Tokens by layer that were taken, and that were asked about."""
        self._counted: dict[str, list[tuple[int, int, Array]]] = {}
        self._depth_counted: list[tuple[int, int, int]] = []

    def experts(
        self, layer: int, group: str, u: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        self._experts.setdefault(group, []).append((layer, eligible, selected))

    def depth(self, layer: int, x: Tensor, logits: Tensor, eligible: Tensor, taken: Tensor) -> None:
        self._depth.append((layer, eligible, taken))

    def add_expert_counts(self, layer: int, group: str, num_tokens: int, counts: Array) -> None:
        """Of tokens that a group's router saw: int64 [2 E + 1], how many each expert took, then
        how many have 0, 1, ... E experts."""
        self._counted.setdefault(group, []).append((layer, num_tokens, counts))

    def add_depth_counts(self, layer: int, num_tokens: int, num_taken: int) -> None:
        """Of tokens that a depth router saw."""
        self._depth_counted.append((layer, num_taken, num_tokens - num_taken))

    def close(self, *, non_blocking: bool = True) -> None:
        """Adds up what was selected, and starts bringing the sums to the host.

        Args:
            non_blocking: whether `counts` may be called only once the device got this far.
        """

        def host(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", non_blocking=non_blocking)

        self._sums = {}
        for group, entries in self._experts.items():
            selected = torch.stack([entry[2] for entry in entries])  # [L, T, E]
            eligible = torch.stack([entry[1] for entry in entries])  # [L, T]
            sizes = torch.arange(selected.shape[2] + 1, device=selected.device)
            is_size = selected.sum(2).unsqueeze(2) == sizes  # [L, T, E + 1]
            fanout = (is_size & eligible.unsqueeze(2)).sum((0, 1))
            self._sums[group] = (host(selected.sum(1)), host(eligible.sum(1)), host(fanout))
        if self._depth:
            taken = torch.stack([entry[2] for entry in self._depth]).sum(1)
            routed = torch.stack([entry[1] for entry in self._depth]).sum(1)
            self._depth_sums = host(taken), host(routed)

    def counts(self) -> RoutingCounts:
        """What `close` added up; waits for the device where it was not closed."""
        if self._sums is None:
            self.close(non_blocking=False)
        assert self._sums is not None
        expert_tokens: list[tuple[int, str, tuple[int, ...]]] = []
        group_tokens: list[tuple[int, str, int]] = []
        per_token: dict[str, tuple[int, ...]] = {}
        for group, (loads, counts, fanout) in self._sums.items():
            layers = [entry[0] for entry in self._experts[group]]
            expert_tokens += [
                (layer, group, tuple(load))
                for layer, load in zip(layers, loads.tolist(), strict=True)
            ]
            group_tokens += [
                (layer, group, count) for layer, count in zip(layers, counts.tolist(), strict=True)
            ]
            per_token[group] = tuple(fanout.tolist())
        for group, entries in self._counted.items():
            num_experts = len(entries[0][2]) // 2
            table = np.array([counts for _, _, counts in entries])  # [L, 2 E + 1]
            expert_tokens += [
                (layer, group, tuple(load))
                for (layer, _, _), load in zip(
                    entries, table[:, :num_experts].tolist(), strict=True
                )
            ]
            group_tokens += [(layer, group, num_tokens) for layer, num_tokens, _ in entries]
            per_token[group] = tuple(table[:, num_experts:].sum(0).tolist())
        depth = list(self._depth_counted)
        if self._depth_sums is not None:
            taken, routed = (sums.tolist() for sums in self._depth_sums)
            depth += [
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
        index = upload(np.array(rows, np.int64), batch.token_ids.device)
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
    """Selections of R tokens."""

    token_ids: Tensor
    """int64 [R]."""
    modality: Tensor
    """int8 [R]."""
    selected: dict[str, dict[int, Tensor]]
    """By group and layer: bool [R, E]. Groups of one expert route nothing and are not here."""
    skipped: dict[int, Tensor]
    """By depth-routed layer: bool [R]."""

    def on_host(self) -> RoutingTrace:
        """The same, once the device got this far."""

        def host(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", non_blocking=True)

        return RoutingTrace(
            token_ids=host(self.token_ids),
            modality=host(self.modality),
            selected={
                group: {layer: host(chosen) for layer, chosen in layers.items()}
                for group, layers in self.selected.items()
            },
            skipped={layer: host(passed) for layer, passed in self.skipped.items()},
        )

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
