"""Which of the two servable ways is better: calibrated thresholds or auxiliary routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momaserve.router_lab.losses import MODALITIES, loss_difference
from momaserve.router_lab.policies import CALIBRATED, CAUSAL
from momaserve.router_lab.selections import SelectionCounts, f1
from momaserve.router_lab.statistics import Bootstrap, Sums


def served_difference(
    losses: Mapping[str, Sums], counts: Mapping[str, SelectionCounts], bootstrap: Bootstrap
) -> dict[str, Any]:
    """`calibrated` less `causal`: loss by modality and F1 by kind of router, paired.

    Each is left out unless both were measured.
    """
    names = (CALIBRATED.name, CAUSAL.name)
    found: dict[str, Any] = {}
    if all(name in losses for name in names):
        found["loss"] = {
            modality: bootstrap.estimate(
                loss_difference(modality), *(losses[name] for name in names)
            ).to_dict()
            for modality in MODALITIES
        }

    def more_f1(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
        return f1(first) - f1(second)

    if all(name in counts for name in names):
        found["f1"] = {
            kind: bootstrap.estimate(
                more_f1, *(counts[name].documents(kind) for name in names)
            ).to_dict()
            for kind in counts[CAUSAL.name].kinds
        }
    return found
