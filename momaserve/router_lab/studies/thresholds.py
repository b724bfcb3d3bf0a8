"""Where to cut: loss against experts per token as cuts or capacities move."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from momaserve.router_lab.losses import MODALITIES, describe_loss
from momaserve.router_lab.policies import (
    CALIBRATED,
    CAUSAL,
    DEPTH,
    EXPERT_CHOICE,
    EXPERTS,
    Capacity,
    Cut,
    Edit,
    Policy,
    part_of,
)
from momaserve.router_lab.selections import RouterScores, kind_of
from momaserve.router_lab.study import Study
from momaserve.training.fit_routers import capacity_cut
from momaserve.training.packing import PackedRows

PROBABILITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Global cuts of auxiliary routers; 0.5 is how they are served."""
OFFSETS = (-2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0)
"""Are added to the calibrated thresholds, in logits; 0 is how they are served."""
FACTORS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""Of the trained capacity: per-expert cuts select that share of fresh training rows."""
_CALIBRATION_BATCHES = 16


def study_thresholds(study: Study) -> dict[str, Any]:
    """On training rows; expert cuts move with depth decisions as served, and the reverse."""
    batches = study.data.splits["train"]
    probabilities, offsets, factors = map(study.points, (PROBABILITIES, OFFSETS, FACTORS))
    parts = [EXPERTS] * any(k != DEPTH for k in study.kinds) + [DEPTH] * study.has_depth
    has_aux, has_cuts = (study.lab.missing_for(p) is None for p in (CAUSAL, CALIBRATED))
    fresh = [study.data.fresh_rows(step) for step in range(_calibration_batches(study))]
    num_points = len(factors) + has_aux * (len(probabilities) + len(factors))
    num_points += has_cuts * (len(offsets) + len(factors))
    study.begin("thresholds", len(batches) * (1 + len(parts) * num_points) + len(fresh))
    scores = _scores(study, fresh)
    oracle = study.run_all(batches, EXPERT_CHOICE)
    sweeps: list[dict[str, Any]] = []

    def sweep(family: str, part: str, base: Policy, points: Sequence[tuple[float, Edit]]) -> None:
        found = []
        for setting, edit in points:
            trial = study.run_all(batches, Policy(f"{family} {setting}", base.base, (edit,)))
            loss = {
                modality: describe_loss(trial.losses, oracle.losses, modality, study.bootstrap)
                for modality in MODALITIES
            }
            each = {"setting": setting, "experts_per_token": trial.experts_per_token}
            found.append(each | {"loss": loss})
        sweeps.append({"family": family, "part": part, "points": found})

    routers = study.lab.routers
    for part in parts:
        mine = [name for name in routers if part_of(kind_of(name)) == part]
        sweep("expert_choice", part, EXPERT_CHOICE, [(f, Capacity(f, part)) for f in factors])
        if has_aux:
            zeros = {name: torch.zeros(len(routers[name].weight)) for name in mine}
            cuts = [(p, _moved(zeros, math.log(p / (1 - p)))) for p in probabilities]
            sweep("aux_global", part, CAUSAL, [(p, Cut("aux", cut)) for p, cut in cuts])
            quantiles = [(f, capacity_cuts(study, scores, "aux", mine, f)) for f in factors]
            sweep("aux_per_expert", part, CAUSAL, [(f, Cut("aux", cut)) for f, cut in quantiles])
        if has_cuts:
            stored = {n: t for n in mine if (t := routers[n].threshold_logits) is not None}
            moved = [(o, Cut("main", _moved(stored, o))) for o in offsets]
            sweep("calibrated_offset", part, CALIBRATED, moved)
            quantiles = [(f, capacity_cuts(study, scores, "main", mine, f)) for f in factors]
            per_expert = [(f, Cut("main", cut)) for f, cut in quantiles]
            sweep("calibrated_per_expert", part, CALIBRATED, per_expert)
    return {
        "sweeps": sweeps,
        "oracle": {"experts_per_token": oracle.experts_per_token}
        | {
            modality: describe_loss(oracle.losses, oracle.losses, modality, study.bootstrap)["nll"]
            for modality in MODALITIES
        },
    }


def _calibration_batches(study: Study) -> int:
    return max(2, min(_CALIBRATION_BATCHES, study.settings.batches))


def _moved(cuts: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: cut + by for name, cut in cuts.items()}


def _scores(study: Study, fresh: Sequence[PackedRows]) -> RouterScores:
    scores = RouterScores()
    for number, rows in enumerate(fresh):
        scores.add(study.run(rows, EXPERT_CHOICE, number, with_scores=True).sites)
    return scores


def capacity_cuts(
    study: Study, scores: RouterScores, which: str, names: Sequence[str], factor: float = 1.0
) -> dict[str, Tensor]:
    """Per-expert cuts [E] that select `factor` times the trained capacity of recorded tokens.

    Args:
        which: "aux" or "main" logits.
        names: of routers; one that met no token has no cut.
    """
    found = {name: scores.of(name, which) for name in names if name in scores.sites}
    return {
        name: capacity_cut(torch.from_numpy(logits), study.lab.routers[name], factor)
        for name, logits in found.items()
        if logits is not None
    }
