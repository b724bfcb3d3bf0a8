"""One training forward: packed rows through the model, routed by one policy, to losses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.layers.batch import (
    POLICY_CODES,
    Attention,
    ForwardBatch,
    RouterNoise,
    RoutingObserver,
    RoutingPlan,
)
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.training.packing import PackedAttention, PackedRows


def forward_batch(
    config: ModelConfig,
    rows: PackedRows,
    policy: RoutingPolicy = RoutingPolicy.EXPERT_CHOICE,
    observer: RoutingObserver | None = None,
    noise: RouterNoise | None = None,
    attention: Attention | None = None,
) -> ForwardBatch:
    """A batch of packed rows routed by one policy; the scope of expert choice is the batch.

    Args:
        attention: within documents; None is `PackedAttention`.
    """
    token_ids = rows.token_ids.flatten()
    modality = modalities_of(config, token_ids)
    segments = torch.where(rows.is_padding.flatten(), -1, 0)
    return ForwardBatch(
        token_ids=token_ids,
        positions=rows.positions.flatten(),
        modality=modality,
        modalities=frozenset(Modality),
        routing=RoutingPlan(
            policies=frozenset({policy}),
            policy=torch.full_like(modality, POLICY_CODES[policy]),
            segments=segments,
            num_segments=1,
            noise=noise,
        ),
        attention=PackedAttention(rows) if attention is None else attention,
        observer=observer,
    )


def modalities_of(config: ModelConfig, token_ids: Tensor) -> Tensor:
    """int8, values of Modality, of ids of any shape."""
    modality = torch.zeros_like(token_ids, dtype=torch.int8)
    if config.image is not None:
        image = config.image
        inside = (token_ids >= image.first_token_id) & (token_ids < image.stop_token_id)
        modality[inside] = int(Modality.IMAGE)
    return modality


def token_losses(
    model: MomaModel, rows: PackedRows, batch: ForwardBatch, *, max_rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Losses in nat of the learnt tokens and whether each is an image token: two [M] tensors.

    Args:
        max_rows: most tokens whose logits are held at a time; None is all of them.
    """
    targets = rows.targets.flatten()
    learnt = (targets >= 0).nonzero().squeeze(1)
    hidden = model(batch)[learnt]
    wanted = targets[learnt]
    size = max(1, len(wanted)) if max_rows is None else max_rows
    loss = torch.cat(
        [
            F.cross_entropy(model.logits(part), mine, reduction="none")
            for part, mine in zip(torch.split(hidden, size), torch.split(wanted, size), strict=True)
        ]
    )
    return loss, modalities_of(model.config, wanted) == int(Modality.IMAGE)


@dataclass(slots=True)
class LossSums:
    """Sums of token losses by modality; `means` are in nat per learnt token."""

    totals: dict[str, float] = field(default_factory=lambda: {"text": 0.0, "image": 0.0})
    counts: dict[str, int] = field(default_factory=lambda: {"text": 0, "image": 0})

    def add(self, losses: Tensor, is_image: Tensor) -> None:
        """What `token_losses` gave."""
        losses = losses.detach().double()
        for name, mask in (("text", ~is_image), ("image", is_image)):
            self.totals[name] += float(losses[mask].sum())
            self.counts[name] += int(mask.sum())

    def means(self) -> dict[str, float]:
        """Of every modality that was met, and of `all` tokens alike."""
        found = {name: self.totals[name] / n for name, n in self.counts.items() if n}
        count = sum(self.counts.values())
        return found | ({"all": sum(self.totals.values()) / count} if count else {})


@torch.no_grad()
def validation_losses(model: MomaModel, batches: Iterable[PackedRows]) -> dict[str, float]:
    """Means of `LossSums` under the training condition, expert choice over each batch."""
    sums = LossSums()
    for rows in batches:
        sums.add(*token_losses(model, rows, forward_batch(model.config, rows)))
    return sums.means()
