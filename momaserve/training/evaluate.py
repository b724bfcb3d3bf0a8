"""How well causal routing imitates expert choice: agreement of routers, loss by policy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.models.moma import MomaModel
from momaserve.training.fit_routers import named_routers, record_selections
from momaserve.training.forward import LossSums, forward_batch, token_losses
from momaserve.training.packing import PackedRows


@dataclass(slots=True)
class Agreement:
    """Confusion counts of one way to select, against batch-level expert choice."""

    true_positive: int = 0
    false_positive: int = 0
    false_negative: int = 0
    true_negative: int = 0

    def add(self, selected: Tensor, wanted: Tensor) -> None:
        """Both bool, of one shape."""
        self.true_positive += int((selected & wanted).sum())
        self.false_positive += int((selected & ~wanted).sum())
        self.false_negative += int((~selected & wanted).sum())
        self.true_negative += int((~selected & ~wanted).sum())

    @property
    def accuracy(self) -> float:
        right = self.true_positive + self.true_negative
        return right / max(1, right + self.false_positive + self.false_negative)

    @property
    def f1(self) -> float:
        wrong = self.false_positive + self.false_negative
        return 2 * self.true_positive / max(1, 2 * self.true_positive + wrong)


@torch.no_grad()
def router_agreement(
    model: MomaModel, batches: Iterable[PackedRows]
) -> dict[str, dict[str, Agreement]]:
    """Agreement by policy and kind of router ("text", "image", "depth")."""
    routers = named_routers(model)
    result: dict[str, dict[str, Agreement]] = {}
    for rows in batches:
        for entry in record_selections(model, rows):
            router = routers[entry.name]
            ways = {RoutingPolicy.THRESHOLD: entry.logits > 0}
            if router.aux is not None:
                ways[RoutingPolicy.CAUSAL] = router.aux(entry.inputs) > 0
            if router.threshold_logits is not None:
                ways[RoutingPolicy.CALIBRATED] = entry.logits > router.threshold_logits
            for policy, selected in ways.items():
                kind = entry.name.partition(".")[2]
                agreement = result.setdefault(policy, {}).setdefault(kind, Agreement())
                agreement.add(selected, entry.selected)
    return result


@torch.no_grad()
def loss_by_policy(
    model: MomaModel, batches: Iterable[PackedRows], policies: Iterable[RoutingPolicy]
) -> dict[str, dict[str, float]]:
    """Teacher-forced loss in nat per learnt token, by policy and modality."""
    sums = {policy: LossSums() for policy in policies}
    for rows in batches:
        for policy, found in sums.items():
            found.add(*token_losses(model, rows, forward_batch(model.config, rows, policy)))
    return {
        policy: {name: found.means().get(name, 0.0) for name in ("text", "image")}
        for policy, found in sums.items()
    }
