"""Other ways to fit what selects: auxiliary routers and thresholds, on the frozen model.

All variants see the same fresh training rows in the same order. A step's forward pass is made
once for all of them, since no variant changes what expert choice selects. Nothing is written
into the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from momaserve.layers.routing import AuxiliaryRouter, Router
from momaserve.router_lab.losses import MODALITIES, describe_losses, loss_difference
from momaserve.router_lab.policies import CALIBRATED, CAUSAL, EXPERT_CHOICE, Policy
from momaserve.router_lab.selections import AGREEMENTS, SelectionCounts
from momaserve.router_lab.statistics import Sums
from momaserve.router_lab.study import Study
from momaserve.training.fit_routers import (
    FitRoutersConfig,
    Thresholds,
    as_module,
    auxiliary_loss,
    joint_thresholds,
    new_auxiliary_routers,
    record_selections,
    routed_groups,
)
from momaserve.training.packing import PackedRows
from momaserve.training.run import cosine

_CALIBRATION_BATCHES = 16
_ROUNDS = 4
"""Of `joint_thresholds`."""
_NUM_THRESHOLDS = 3
_SERVED = (CAUSAL, CALIBRATED)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to fit auxiliary routers."""

    name: str
    width: int
    """Hidden units."""
    num_steps: int
    loss: str


@dataclass(frozen=True, slots=True)
class Selector:
    """Something that may replace what a checkpoint selects with."""

    name: str
    policy: Policy
    auxiliary: Mapping[str, AuxiliaryRouter]
    """Empty: the checkpoint's own."""
    thresholds: Mapping[str, Tensor]
    """Logits [E]; empty: the checkpoint's own."""
    about: Mapping[str, Any]


def variants(hidden_size: int, num_steps: int) -> list[Variant]:
    """Widths D/8, D/2 and D; a quarter of the steps; the losses of `router_loss`."""
    half = max(1, hidden_size // 2)
    return [
        Variant("bce, D/2", half, num_steps, "bce"),
        Variant("bce, D/8", max(1, hidden_size // 8), num_steps, "bce"),
        Variant("bce, D", hidden_size, num_steps, "bce"),
        Variant("bce, D/2, a quarter of the steps", half, max(1, num_steps // 4), "bce"),
        Variant("affinity-weighted bce, D/2", half, num_steps, "weighted_bce"),
        Variant("distilled output, D/2", half, num_steps, "distillation"),
    ]


def study_better_routers(study: Study) -> dict[str, Any]:
    """By split and selector: agreement with the oracle, and losses."""
    settings, model = study.settings, study.lab.model
    tried = variants(model.config.hidden_size, settings.fit_steps)
    batches = study.data.splits
    calibrated = min(_CALIBRATION_BATCHES, settings.fit_steps)
    shipped = [policy for policy in _SERVED if study.lab.missing_for(policy) is None]
    num_selectors = len(shipped) + len(tried) + _NUM_THRESHOLDS
    num_passes = settings.fit_steps + _NUM_THRESHOLDS
    num_passes += sum(map(len, batches.values())) * (1 + 2 * num_selectors)
    study.begin("better-routers", num_passes)
    auxiliary, running = _fitted(study, tried)
    selectors = [Selector(f"{policy.name}, shipped", policy, {}, {}, {}) for policy in shipped]
    for each in tried:
        parameters = sum(p.numel() for p in as_module(auxiliary[each.name]).parameters())
        about = {"width": each.width, "steps": each.num_steps, "parameters": parameters}
        selectors.append(Selector(each.name, CAUSAL, auxiliary[each.name], {}, about))
    fresh = [study.data.fresh_rows(step).to(study.lab.device) for step in range(calibrated)]
    for name, cuts in (
        ("thresholds, running mean", running),
        ("thresholds, pooled quantile", joint_thresholds(model, fresh, 0)),
        ("thresholds, joint", joint_thresholds(model, fresh, _ROUNDS)),
    ):
        selectors.append(Selector(name, CALIBRATED, {}, cuts, {}))
        study.progress.step()
    return {
        "fit": {"steps": settings.fit_steps, "learning_rate": FitRoutersConfig().learning_rate},
        "splits": {name: _judged(study, rows, selectors) for name, rows in batches.items()},
        "about": {selector.name: dict(selector.about) for selector in selectors},
    }


def _fitted(
    study: Study, tried: Sequence[Variant]
) -> tuple[dict[str, dict[str, AuxiliaryRouter]], dict[str, Tensor]]:
    """Auxiliary routers by variant, and the thresholds that `fit-routers` would have found."""
    model, rows_of_step = study.lab.model, study.data.fresh_rows
    config = FitRoutersConfig(num_steps=study.settings.fit_steps, seed=study.settings.seed)
    device = study.lab.device
    groups, routers = routed_groups(model), study.lab.routers
    auxiliary, optimizers = {}, {}
    for each in tried:
        auxiliary[each.name] = new_auxiliary_routers(model, config.seed, each.width)
        parameters = as_module(auxiliary[each.name]).to(device).parameters()
        optimizers[each.name] = torch.optim.AdamW(parameters, lr=config.learning_rate)
    thresholds = Thresholds(routers).to(device)
    for step in range(config.num_steps):
        # Calibration and the first steps share rows; no batch that is scored is among them.
        selections = record_selections(model, rows_of_step(step).to(device))
        thresholds.update(selections, config.threshold_decay)
        for each in tried:
            if not selections or step >= each.num_steps:
                continue
            optimizer = optimizers[each.name]
            warmup = min(config.warmup_steps, each.num_steps // 10)
            factor = cosine(step, each.num_steps, warmup=warmup, floor=0.02)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            loss, _ = auxiliary_loss(auxiliary[each.name], selections, each.loss, groups)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        study.progress.step()
    running = {
        name: thresholds.get_buffer(name.replace(".", "_")).double().logit().float()
        for name in routers
    }
    return auxiliary, running


@contextmanager
def installed(
    routers: Mapping[str, Router],
    auxiliary: Mapping[str, AuxiliaryRouter],
    thresholds: Mapping[str, Tensor],
) -> Iterator[None]:
    """The model's routers select with other things for a while."""
    kept = {name: (router.aux, router.threshold_logits) for name, router in routers.items()}
    try:
        for name, router in routers.items():
            router.aux = auxiliary.get(name, router.aux)
            if name in thresholds:
                router.threshold_logits = thresholds[name].to(router.weight.device)
            elif thresholds and router.threshold_logits is None:
                # It met no token that it could be calibrated on: it selects none.
                router.threshold_logits = torch.full_like(router.weight[:, 0], float("inf"))
        yield
    finally:
        for name, router in routers.items():
            router.aux, router.threshold_logits = kept[name]


def _judged(
    study: Study, batches: Sequence[PackedRows], selectors: Sequence[Selector]
) -> dict[str, Any]:
    """By selector: agreement with the oracle on its hidden states, and the loss when served."""
    losses: dict[str, list[Sums]] = {EXPERT_CHOICE.name: []}
    counts = {selector.name: SelectionCounts() for selector in selectors}
    routers = study.lab.routers
    for number, rows in enumerate(batches):
        losses[EXPERT_CHOICE.name].append(study.run(rows, EXPERT_CHOICE, number).losses)
        for selector in selectors:
            with installed(routers, selector.auxiliary, selector.thresholds):
                oracle = study.run(rows, EXPERT_CHOICE, number, with_scores=True).sites
                decided = study.decided(oracle, selector.policy.base)
                counts[selector.name].add(oracle, decided, rows)
                found = study.run(rows, selector.policy, number)
            losses.setdefault(selector.name, []).append(found.losses)
    sums = {name: np.concatenate(each) for name, each in losses.items()}
    described = describe_losses(sums, EXPERT_CHOICE.name, study.bootstrap)
    reference = selectors[0].name
    return {
        selector.name: {
            "loss": described[selector.name],
            "against": {
                modality: study.bootstrap.estimate(
                    loss_difference(modality), sums[selector.name], sums[reference]
                ).to_dict()
                for modality in MODALITIES
            },
            "agreement": {
                kind: {
                    measure: study.bootstrap.estimate(
                        AGREEMENTS[measure], counts[selector.name].documents(kind)
                    ).to_dict()
                    for measure in ("accuracy", "f1")
                }
                for kind in counts[selector.name].kinds
            },
        }
        for selector in selectors
    }
