"""Scores a batch of samples: what the routers would have chosen, and what it costs.

The oracle is expert choice over the whole batch, as in training. Decisions are compared on its
hidden states, as `at_expert_choice` of the report does; the losses of the served policy come from
a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.layers.batch import RoutingObserver
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.router_lab.losses import document_losses
from momaserve.router_lab.selections import Recorder, SelectionCounts, decided, kind_of
from momaserve.router_lab.shadow.batch import Gathered, scopes
from momaserve.router_lab.shadow.rows import SampleAttention, rows_of, served_plan
from momaserve.router_lab.shadow.sample import Sample
from momaserve.training.fit_routers import named_routers
from momaserve.training.forward import forward_batch

MAX_LOGIT_ROWS = 256
"""Tokens whose logits over the vocabulary are held at a time."""
EXPERT_CHOICE, SERVED = "expert_choice", "served"
PASSES = (EXPERT_CHOICE, SERVED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one batch gave. Immutable."""

    num_requests: int
    by_modality: Mapping[str, int]
    """Tokens by modality."""
    confusion: Mapping[str, NDArray[np.int64]]
    """By router, as `3.image` or `3.depth`: [E, 4] as `SiteCounts` has them. Kinds of routers that
    met too few tokens are not here."""
    losses: Mapping[str, NDArray[np.float64]]
    """By PASSES: [4], nat of text and of image tokens of answers, then how many of each; zero for
    a modality that met too few tokens."""

    @property
    def num_tokens(self) -> int:
        return sum(self.by_modality.values())


@torch.inference_mode()
def evaluate(
    model: MomaModel,
    samples: Sequence[Sample],
    policy: RoutingPolicy,
    *,
    min_tokens: int,
    pause: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Two passes over a batch, which only read the model's weights.

    Args:
        policy: whose decisions are compared with the oracle's.
        min_tokens: with fewer for a kind of router, the batch says nothing of it.
        pause: called between pieces of work; may wait, and may raise to give the batch up.
    """
    gathered = Gathered(model.config)
    for sample in samples:
        gathered.add(sample)
    enough = {kind for kind, count in gathered.by_kind.items() if count >= min_tokens}
    device = model.embed_tokens.device
    rows, routers = rows_of(samples).to(device), named_routers(model)
    recorder = Recorder(rows, routers)
    oracle = forward_batch(
        model.config,
        rows,
        observer=_Pausing(pause, recorder),
        attention=SampleAttention(samples),
    )
    losses = {EXPERT_CHOICE: document_losses(model, rows, oracle, max_rows=MAX_LOGIT_ROWS)}
    pause()
    counts = SelectionCounts()
    counts.add(recorder.sites, decided(recorder.sites, routers, policy), rows)
    pause()
    served = replace(oracle, routing=served_plan(samples, device), observer=_Pausing(pause))
    losses[SERVED] = document_losses(model, rows, served, max_rows=MAX_LOGIT_ROWS)
    pause()
    return Evaluation(
        num_requests=len(samples),
        by_modality={m.label: count for m, count in gathered.by_modality.items()},
        confusion={
            site: each.confusion
            for site, each in counts.sites.items()
            if kind_of(site) in enough and each.confusion.any()
        },
        losses={
            name: each.sum(0) * _columns(model.config, enough) for name, each in losses.items()
        },
    )


def _columns(config: ModelConfig, enough: set[str]) -> NDArray[np.float64]:
    """[4]: 1 for the modalities of which a batch says something, in `document_losses`' order.

    A modality is told of if every kind of router that chooses among its tokens had enough.
    """
    short = {m for kind, found in scopes(config).items() if kind not in enough for m in found}
    told = [float(modality not in short) for modality in Modality]
    return np.array([*told, *told])


class _Pausing:
    """An observer that lets others go first before each router, and then tells another."""

    def __init__(self, pause: Callable[[], None], inner: RoutingObserver | None = None) -> None:
        self._pause = pause
        self._inner = inner

    def experts(
        self, layer: int, group: str, u: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        self._pause()
        if self._inner is not None:
            self._inner.experts(layer, group, u, logits, eligible, selected)

    def depth(self, layer: int, x: Tensor, logits: Tensor, eligible: Tensor, taken: Tensor) -> None:
        self._pause()
        if self._inner is not None:
            self._inner.depth(layer, x, logits, eligible, taken)
