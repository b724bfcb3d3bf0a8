"""Samples, tiny random models, and a scoring thread that a test can wait for."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from momaserve.config import RoutingPolicy
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.weights import load_model
from momaserve.router_lab.shadow.batch import BatchRule
from momaserve.router_lab.shadow.evaluation import Evaluation
from momaserve.router_lab.shadow.sample import Sample
from momaserve.router_lab.shadow.shadow_eval import ShadowEval
from tests.reference import moma_float64 as reference

CAUSAL, CALIBRATED = RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED
WHOLE = RoutingPolicy.EXPERT_CHOICE
HANG_S = 30.0
"""A test that gets here hangs."""
SMALL = BatchRule(num_tokens=20, min_tokens=4, max_num_tokens=200)
"""Scores samples of a few tokens, and never because of the clock within a test."""


def sample(
    ids: Sequence[int],
    num_prompt_tokens: int = 2,
    routing: RoutingPolicy = CAUSAL,
    prompt_routing: RoutingPolicy | None = None,
) -> Sample:
    return Sample(
        token_ids=np.array(ids, dtype=np.int32),
        num_prompt_tokens=num_prompt_tokens,
        routing=routing,
        prompt_routing=prompt_routing or routing,
    )


def tiny(folder: Path, case: str = "4t4i_post", **changes: Any) -> MomaModel:
    reference.random_checkpoint(folder, seed=5, **reference.CASES[case], **changes)
    config = ModelConfig.load(folder)
    return load_model(folder, config, dtype=torch.float32, device=torch.device("cpu"))


def documents(folder: Path, count: int = 3) -> list[list[int]]:
    """Token ids of words and pictures that the checkpoint of a folder knows."""
    config, _ = reference.load_checkpoint(folder)
    return [
        list(reference.sample_ids(config, seed, pictures=2, words=6 + 3 * seed))
        for seed in range(count)
    ]


class Watched:
    """A `ShadowEval` whose batches a test waits for."""

    def __init__(self, shadow_eval: ShadowEval) -> None:
        self.shadow_eval = shadow_eval
        self._ends: queue.SimpleQueue[Evaluation | None] = queue.SimpleQueue()
        self._add, self._on_failed = shadow_eval.totals.add, shadow_eval.totals.on_failed
        shadow_eval.totals.add = self._added  # type: ignore[method-assign]
        shadow_eval.totals.on_failed = self._failed  # type: ignore[method-assign]

    def next_batch(self) -> Evaluation | None:
        """What the next batch gave, once the totals have it; None if it failed."""
        return self._ends.get(timeout=HANG_S)

    def _added(self, found: Evaluation) -> None:
        self._add(found)
        self._ends.put(found)

    def _failed(self) -> bool:
        is_first = self._on_failed()
        self._ends.put(None)
        return is_first
