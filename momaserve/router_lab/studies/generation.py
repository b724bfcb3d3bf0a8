"""The demo's tasks under every policy that can serve, one try for each item and policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from momaserve.config import RoutingPolicy
from momaserve.llm import LLM
from momaserve.router_lab.policies import CALIBRATED, CAUSAL
from momaserve.router_lab.source import SPLITS
from momaserve.router_lab.statistics import mcnemar
from momaserve.router_lab.study import Study
from momaserve.training.demo import select_items
from momaserve.training.demo_eval import PictureIndex, draw, name_pictures, sample_items
from momaserve.training.dictionary.corpus import Corpus
from momaserve.training.dictionary.item import Item

TASKS = ("name to picture", "picture to name", "round trip")
PROMPT_CHOICE = "expert_choice_prompt"
_ROUTING: Mapping[str, dict[str, RoutingPolicy]] = {
    CAUSAL.name: {"routing": RoutingPolicy.CAUSAL},
    CALIBRATED.name: {"routing": RoutingPolicy.CALIBRATED},
    PROMPT_CHOICE: {
        "routing": RoutingPolicy.CAUSAL,
        "prompt_routing": RoutingPolicy.EXPERT_CHOICE,
    },
}
_SIGNIFICANT = 0.05

Outcomes = Mapping[str, Sequence[bool]]
"""Whether each item came out right, by task."""


def study_generation(study: Study) -> dict[str, Any]:
    """Through the engine, as a user would ask, with the checkpoint's own sampling.

    {"skipped": why} for data that is not the dictionary.
    """
    if study.data.dictionary is None:
        return {"skipped": "tasks are scored on the dictionary alone"}
    recipe, corpus = study.data.dictionary
    index, seed = PictureIndex(corpus), study.settings.seed
    items = {
        split: sample_items(found, study.settings.samples, seed)
        for split in SPLITS
        if (found := select_items(corpus, recipe.dictionary, split))
    }
    served = [
        name
        for name, options in _ROUTING.items()
        if study.lab.model.missing_for(options["routing"]) is None
    ]
    if not served:
        return {"skipped": "the checkpoint has neither auxiliary routers nor thresholds"}
    study.begin("generation", len(served) * len(items))
    outcomes: dict[str, dict[str, Outcomes]] = {split: {} for split in items}
    for name in served:
        threads = torch.get_num_threads()
        options = {"threads": threads, "device": study.lab.device.type, **_ROUTING[name]}
        llm = LLM(study.checkpoint, dtype="float32", **options)
        for split, chosen in items.items():
            outcomes[split][name] = _outcomes(llm, corpus, index, chosen, seed)
            study.progress.step()
    return {
        "samples": {split: len(chosen) for split, chosen in items.items()},
        "splits": {split: compare(found) for split, found in outcomes.items()},
    }


def _outcomes(
    llm: LLM, corpus: Corpus, index: PictureIndex, items: Sequence[Item], seed: int
) -> Outcomes:
    """As `demo_eval.score_tasks` counts them, item by item."""
    drawn = draw(llm, [item.name for item in items], seed)
    given = [Image.fromarray(np.asarray(corpus.pictures[item.id])) for item in items]
    names, again = (name_pictures(llm, pictures, seed) for pictures in (given, drawn))
    pairs = list(zip(items, drawn, strict=True))
    right = (
        [index.nearest(picture, 1)[0] == index.identity(item) for item, picture in pairs],
        [name == item.name for item, name in zip(items, names, strict=True)],
        [name == item.name for item, name in zip(items, again, strict=True)],
    )
    return dict(zip(TASKS, right, strict=True))


def compare(outcomes: Mapping[str, Outcomes]) -> dict[str, Any]:
    """By task and policy: the score, and whether it is worse than the best one's.

    `p` is McNemar's, exact and two-sided, on the items that only one of the two got right.
    """
    found: dict[str, Any] = {}
    for task in TASKS:
        best = max(outcomes, key=lambda name: sum(outcomes[name][task]))
        rows: dict[str, Any] = {}
        for name, each in outcomes.items():
            pairs = list(zip(each[task], outcomes[best][task], strict=True))
            gained, lost = pairs.count((True, False)), pairs.count((False, True))
            p = mcnemar(gained, lost)
            rows[name] = {
                "score": sum(each[task]) / len(pairs),
                "only_this": gained,
                "only_best": lost,
                "p": p,
                "is_worse": lost > gained and p < _SIGNIFICANT,
            }
        found[task] = {"best": best, "policies": rows}
    return found
