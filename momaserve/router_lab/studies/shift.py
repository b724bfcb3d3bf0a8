"""Other data than was trained on: routers and losses as rows drift away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from momaserve.router_lab.comparison import served_difference
from momaserve.router_lab.losses import describe_losses
from momaserve.router_lab.policies import CALIBRATED, CAUSAL, EXPERT_CHOICE, Policy
from momaserve.router_lab.selections import AGREEMENTS, SelectionCounts
from momaserve.router_lab.shifted import CLEAN, Condition, Conditions
from momaserve.router_lab.statistics import Sums
from momaserve.router_lab.study import Study

_MEASURES = ("accuracy", "f1")


def study_shift(study: Study) -> dict[str, Any]:
    """On training documents, changed. Routers are judged against the oracle of the same rows."""
    policies = [p for p in (EXPERT_CHOICE, CAUSAL, CALIBRATED) if study.lab.missing_for(p) is None]
    num_batches = max(2, study.settings.batches * 3 // 8)
    conditions = Conditions(study.data, num_batches, study.settings.seed, study.points)
    made = list(conditions)
    study.begin("shift", len(policies) * sum(len(each.batches) for each in made))
    shifts: dict[str, dict[str, Any]] = {}
    for each in made:
        shift = shifts.setdefault(each.shift, {"unit": each.unit, "points": []})
        shift["points"].append(_measured(study, each, policies))
    (clean,) = shifts.pop(CLEAN)["points"]
    return {"clean": clean, "shifts": shifts, "skipped": conditions.skipped}


def _measured(study: Study, condition: Condition, policies: Sequence[Policy]) -> dict[str, Any]:
    losses: dict[str, list[Sums]] = {policy.name: [] for policy in policies}
    counts = {policy.name: SelectionCounts() for policy in policies[1:]}
    for number, rows in enumerate(condition.batches):
        oracle = study.run(rows, EXPERT_CHOICE, number, with_scores=True)
        losses[EXPERT_CHOICE.name].append(oracle.losses)
        for policy in policies[1:]:
            losses[policy.name].append(study.run(rows, policy, number).losses)
            counts[policy.name].add(oracle.sites, study.decided(oracle.sites, policy.base), rows)
    sums = {name: np.concatenate(each) for name, each in losses.items()}
    return {
        "severity": condition.severity,
        "loss": describe_losses(sums, EXPERT_CHOICE.name, study.bootstrap),
        "agreement": {
            name: {
                kind: {
                    measure: study.bootstrap.estimate(
                        AGREEMENTS[measure], each.documents(kind)
                    ).to_dict()
                    for measure in _MEASURES
                }
                for kind in each.kinds
            }
            for name, each in counts.items()
        },
        "served_difference": served_difference(sums, counts, study.bootstrap),
    }
