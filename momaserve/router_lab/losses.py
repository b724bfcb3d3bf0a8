"""Losses of documents: sums by modality from one pass, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momaserve.layers.batch import ForwardBatch
from momaserve.models.moma import MomaModel
from momaserve.router_lab.statistics import Bootstrap, Estimate, Statistic, Sums
from momaserve.training.forward import token_losses
from momaserve.training.packing import PackedRows

MODALITIES = ("text", "image", "all")
_COLUMNS = {"text": (0,), "image": (1,), "all": (0, 1)}
MARGIN_NAT, MARGIN_SHARE = 0.005, 0.01
"""A loss counts as kept if it rises by no more than the larger of the two."""


def documents_of_tokens(rows: PackedRows) -> Tensor:
    """int64 [R * S], number of each token's document from 0; -1 for padding."""
    if rows.documents is not None:
        return rows.documents.flatten()
    size = rows.token_ids.shape[1]
    return torch.arange(len(rows.token_ids), device=rows.token_ids.device).repeat_interleave(size)


def document_losses(
    model: MomaModel, rows: PackedRows, batch: ForwardBatch, *, max_rows: int | None = None
) -> Sums:
    """[D, 4]: nat of text and of image tokens, then how many of each, for every document.

    Args:
        max_rows: see `token_losses`.
    """
    documents = documents_of_tokens(rows)
    losses, is_image = token_losses(model, rows, batch, max_rows=max_rows)
    losses = losses.detach()
    owner = documents[rows.targets.flatten() >= 0]
    sums = torch.zeros(max(0, int(documents.max()) + 1), 4, dtype=torch.float64)
    for column, mask in enumerate((~is_image, is_image)):
        mine = owner[mask].cpu()
        sums[:, column].index_add_(0, mine, losses[mask].double().cpu())
        sums[:, 2 + column].index_add_(0, mine, torch.ones(len(mine), dtype=torch.float64))
    return sums.numpy()


def mean_loss(modality: str) -> Statistic:
    """Nat per learnt token of a modality, from sums [..., 4]."""
    columns = list(_COLUMNS[modality])
    counts = [2 + column for column in columns]

    def statistic(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            found: NDArray[np.float64] = sums[..., columns].sum(-1) / sums[..., counts].sum(-1)
        return found

    return statistic


def loss_difference(modality: str) -> Statistic:
    """By how many nat per token the first sums' mean loss is above the second's."""
    mean = mean_loss(modality)
    return lambda first, second: mean(first) - mean(second)


def describe_losses(
    runs: Mapping[str, Sums], base: str, bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """By name and modality: `nll`, `perplexity` and `delta`, the paired difference from `base`."""
    return {
        name: {
            modality: describe_loss(sums, runs[base], modality, bootstrap)
            for modality in MODALITIES
            if sums[:, [2 + column for column in _COLUMNS[modality]]].sum() > 0
        }
        for name, sums in runs.items()
    }


def describe_loss(sums: Sums, base: Sums, modality: str, bootstrap: Bootstrap) -> dict[str, Any]:
    nll = bootstrap.estimate(mean_loss(modality), sums)
    delta = bootstrap.estimate(loss_difference(modality), sums, base)
    reference = mean_loss(modality)(base.sum(0))
    return {
        "nll": nll.to_dict(),
        "perplexity": {
            k: None if v is None else float(np.exp(min(v, 700.0))) for k, v in nll.to_dict().items()
        },
        "delta": delta.to_dict(),
        "delta_percent": None if delta.value is None else float(100 * delta.value / reference),
        "kept": kept(delta, float(reference)),
    }


def kept(delta: Estimate, reference: float) -> str | None:
    """Whether a loss is as good as the reference's, by the margin above.

    "yes" where the whole interval is within the margin, "likely" where the difference is but its
    interval reaches out, else "no". Losses below the reference's are within.
    """
    margin = max(MARGIN_NAT, MARGIN_SHARE * reference)
    if delta.value is None:
        return None
    if delta.value > margin:
        return "no"
    return "yes" if delta.high is not None and delta.high <= margin else "likely"
