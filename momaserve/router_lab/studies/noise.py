"""What wrong decisions cost: a share sigma of them turned around, and what rounding turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from momaserve.models.weights import load_model
from momaserve.router_lab.comparison import served_difference
from momaserve.router_lab.losses import MODALITIES, describe_loss, loss_difference, mean_loss
from momaserve.router_lab.passes import Lab
from momaserve.router_lab.policies import (
    CALIBRATED,
    CAUSAL,
    DEPTH,
    EXPERT_CHOICE,
    EXPERTS,
    FLIPS,
    Flip,
    Policy,
    part_of,
)
from momaserve.router_lab.selections import Seen, kind_of
from momaserve.router_lab.statistics import Estimate, Sums, crossing
from momaserve.router_lab.study import Study, Trial
from momaserve.training.packing import PackedRows

SIGMAS = (0.0, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_FLOOR_BATCHES = 8
_ONE_PERCENT = 1.01


def study_noise(study: Study) -> dict[str, Any]:
    """On training rows: loss against sigma, by what is flipped and how, and the noise floor."""
    batches = study.data.splits["train"]
    bases = [p for p in (EXPERT_CHOICE, CAUSAL, CALIBRATED) if study.lab.missing_for(p) is None]
    parts = [EXPERTS] * any(k != DEPTH for k in study.kinds) + [DEPTH] * study.has_depth
    curves = [
        (base, part, kind)
        for base in bases
        for part in parts
        for kind in (FLIPS if base is EXPERT_CHOICE else FLIPS[:1])
    ]
    sigmas = study.points(SIGMAS)
    floor = batches[: max(1, min(_FLOOR_BATCHES, len(batches) // 2))]
    num_passes = len(batches) * (len(bases) + len(curves) * (len(sigmas) - 1))
    num_passes += len(floor) * len(bases) * 2 + len(batches) * (study.baseline is not None)
    study.begin("noise", num_passes)
    clean = {base.name: study.run_all(batches, base) for base in bases}
    baseline = None if study.baseline is None else _losses_of(study, study.baseline, batches)
    found = []
    noisy: dict[tuple[str, float], dict[str, Sums]] = {}
    for base, part, kind in curves:
        trials = [clean[base.name]]
        for sigma in sigmas[1:]:
            flip = Flip(sigma, kind, part)
            policy = Policy(f"{base.name}, {kind} {sigma}", base.base, (flip,))
            trials.append(study.run_all(batches, policy))
        points = [
            _point(study, sigma, trial, clean[base.name], clean[EXPERT_CHOICE.name], part)
            for sigma, trial in zip(sigmas, trials, strict=True)
        ]
        if kind == FLIPS[0]:
            for sigma, trial in zip(sigmas[1:], trials[1:], strict=True):
                noisy.setdefault((part, sigma), {})[base.name] = trial.losses
        curve = {"base": base.name, "part": part, "kind": kind, "points": points}
        found.append(curve | _tolerated(study, sigmas, trials, baseline))
    return {
        "curves": found,
        "served_difference": [
            {"part": part, "sigma": sigma} | served_difference(losses, {}, study.bootstrap)
            for (part, sigma), losses in noisy.items()
        ],
        "floor": {base.name: _floor(study, floor, base) for base in bases},
        "baseline": None
        if baseline is None
        else {
            modality: study.bootstrap.estimate(mean_loss(modality), baseline).to_dict()
            for modality in MODALITIES
        },
    }


def _point(
    study: Study, sigma: float, trial: Trial, clean: Trial, oracle: Trial, part: str
) -> dict[str, Any]:
    """`delta` is the difference from the same policy without noise, `delta_oracle` from the
    training condition."""
    described = {
        modality: describe_loss(trial.losses, clean.losses, modality, study.bootstrap)
        | {
            "delta_oracle": study.bootstrap.estimate(
                loss_difference(modality), trial.losses, oracle.losses
            ).to_dict()
        }
        for modality in MODALITIES
    }
    return {
        "sigma": sigma,
        "flipped": trial.changed.get(part, 0.0),
        "experts_per_token": trial.experts_per_token,
        "loss": described,
    }


def _losses_of(study: Study, lab: Lab, batches: Sequence[PackedRows]) -> Sums:
    """Of another model, in its own training condition."""
    losses = []
    for number, rows in enumerate(batches):
        losses.append(lab.run(rows, EXPERT_CHOICE, number).losses)
        study.progress.step()
    return np.concatenate(losses)


def _tolerated(
    study: Study, sigmas: Sequence[float], trials: Sequence[Trial], baseline: Sums | None
) -> dict[str, Any]:
    """By modality, the sigma from which the loss is 1 % up, and from which the baseline wins.

    None: no sigma that was tried is enough.
    """
    sums = [trial.losses for trial in trials]

    def one_percent(modality: str) -> Estimate:
        mean = mean_loss(modality)

        def statistic(*each: NDArray[np.float64]) -> NDArray[np.float64]:
            curve = np.stack([mean(s) for s in each], axis=-1)
            return crossing(sigmas, curve, _ONE_PERCENT * curve[..., 0])

        return study.bootstrap.estimate(statistic, *sums)

    def loses(modality: str, other: Sums) -> Estimate:
        mean = mean_loss(modality)

        def statistic(*each: NDArray[np.float64]) -> NDArray[np.float64]:
            curve = np.stack([mean(s) for s in each[1:]], axis=-1)
            return crossing(sigmas, curve, mean(each[0]))

        return study.bootstrap.estimate(statistic, other, *sums)

    found: dict[str, Any] = {"one_percent": {m: one_percent(m).to_dict() for m in MODALITIES}}
    if baseline is not None:
        found["loses_to_baseline"] = {m: loses(m, baseline).to_dict() for m in MODALITIES}
    return found


def _floor(study: Study, batches: Sequence[PackedRows], policy: Policy) -> dict[str, Any]:
    """Decisions that differ when weights and activations are bfloat16, and the loss then.

    Routers compute in float32 from what they read, as in serving.
    """
    config, device = study.lab.model.config, study.lab.device
    rounded = Lab(load_model(study.checkpoint, config, dtype=torch.bfloat16, device=device))
    flips: dict[str, tuple[int, int]] = {}
    losses: list[Sums] = []
    exact: list[Sums] = []
    for number, rows in enumerate(batches):
        ours = study.run(rows, policy, number)
        theirs = rounded.run(rows, policy, number)
        study.progress.step()
        exact.append(ours.losses)
        losses.append(theirs.losses)
        for kind, (changed, total) in _differences(ours.sites, theirs.sites).items():
            before = flips.get(kind, (0, 0))
            flips[kind] = (before[0] + changed, before[1] + total)
    rates = {kind: changed / max(1, total) for kind, (changed, total) in flips.items()}
    return {
        "flip_rate": rates,
        EXPERTS: _rate(flips, EXPERTS),
        DEPTH: _rate(flips, DEPTH),
        "delta": {
            modality: study.bootstrap.estimate(
                loss_difference(modality), np.concatenate(losses), np.concatenate(exact)
            ).to_dict()
            for modality in MODALITIES
        },
    }


def _rate(flips: Mapping[str, tuple[int, int]], part: str) -> float | None:
    """Of all routers of EXPERTS or of DEPTH together."""
    mine = [counts for kind, counts in flips.items() if part_of(kind) == part]
    total = sum(counts[1] for counts in mine)
    return sum(counts[0] for counts in mine) / total if total else None


def _differences(
    ours: Mapping[str, Seen], theirs: Mapping[str, Seen]
) -> dict[str, tuple[int, int]]:
    """By kind: decisions that differ, and all that either pass made."""
    found: dict[str, tuple[int, int]] = {}
    for site, seen in ours.items():
        other = theirs[site]
        tokens = int((seen.eligible | other.eligible).sum())
        changed = int((seen.selected != other.selected).sum())
        before = found.get(kind_of(site), (0, 0))
        total = before[1] + tokens * seen.selected.shape[1]
        found[kind_of(site)] = (before[0] + changed, total)
    return found
