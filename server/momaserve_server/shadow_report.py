"""`shadow_eval` of `GET /v1/router`: how well routers choose on live traffic, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momaserve.modality import Modality
from momaserve.router_lab.losses import mean_loss
from momaserve.router_lab.selections import AGREEMENTS, kind_of, layer_of
from momaserve.router_lab.shadow.shadow_eval import ShadowEval
from momaserve.router_lab.shadow.totals import Findings


def shadow_report(shadow_eval: ShadowEval) -> dict[str, Any]:
    """Counts are since the start; `agreement` and `nll` are over the window."""
    found = shadow_eval.totals.findings()
    return {
        "rate": shadow_eval.rate,
        "policy": str(shadow_eval.policy),
        "since": int(found.since),
        "num_requests": found.num_requests,
        "num_waiting_tokens": shadow_eval.num_waiting_tokens,
        "num_dropped": found.num_dropped,
        "num_failed": found.num_failed,
        "tokens": dict(found.tokens),
        "not_routed": list(shadow_eval.not_routed),
        "window": {
            "num_tokens": found.window_tokens,
            "since": None if found.window_since is None else int(found.window_since),
        },
        "agreement": [_group(found, kind) for kind in shadow_eval.totals.kinds],
        "nll": {name: means(sums) for name, sums in found.losses.items()},
    }


def agreement(counts: NDArray[np.int64]) -> dict[str, float | None]:
    """Accuracy, precision, recall and F1 of confusion counts [4]; None is 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: _number(measure(counts)) for name, measure in AGREEMENTS.items()}


def means(sums: NDArray[np.float64]) -> dict[str, float | None]:
    """Nat per token by modality, from sums [4] as `document_losses` has them."""
    return {modality.label: _number(mean_loss(modality.label)(sums)) for modality in Modality}


def _number(value: NDArray[np.float64]) -> float | None:
    return float(value) if math.isfinite(value) else None


def _group(found: Findings, kind: str) -> dict[str, Any]:
    mine = {layer_of(s): counts for s, counts in found.confusion.items() if kind_of(s) == kind}
    return {
        "group": kind,
        **agreement(found.of_kind(kind)),
        "layers": [_layer(layer, counts) for layer, counts in sorted(mine.items())],
    }


def _layer(layer: int, counts: NDArray[np.int64]) -> dict[str, Any]:
    return {
        "layer": layer,
        **agreement(counts.sum(0)),
        "experts": [{"expert": expert, **agreement(each)} for expert, each in enumerate(counts)],
    }
