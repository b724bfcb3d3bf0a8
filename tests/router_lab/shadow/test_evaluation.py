"""A batch's numbers against slow programs: float64, and plain loops over single tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.models.moma import MomaModel
from momaserve.router_lab.passes import Lab
from momaserve.router_lab.policies import EXPERT_CHOICE as ORACLE
from momaserve.router_lab.shadow.evaluation import EXPERT_CHOICE, SERVED, Evaluation, evaluate
from momaserve.router_lab.shadow.rows import rows_of
from momaserve.router_lab.shadow.sample import Sample
from momaserve.training.fit_routers import named_routers
from momaserve.training.forward import forward_batch
from tests.reference import moma_float64 as reference
from tests.router_lab.shadow.factory import (
    CALIBRATED,
    CAUSAL,
    WHOLE,
    documents,
    sample,
    tiny,
)

CASES = ("4t4i_post", "moe_8x_pre", "depth_4t4i_post", "depth_image_only_post")
STARTS = (3, 7, 5)
"""Prompt tokens of the samples."""


def scored(model: MomaModel, samples: list[Sample], **options: Any) -> Evaluation:
    options = {"policy": CAUSAL, "min_tokens": 1, **options}
    policy: RoutingPolicy = options.pop("policy")
    return evaluate(model, samples, policy, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", [CAUSAL, CALIBRATED])
def test_decisions_counted_by_hand(case: str, policy: RoutingPolicy, tmp_path: Path) -> None:
    """Every expert of every router: its best tokens of the batch, and what the policy says of
    each token, one after the other."""
    model = tiny(tmp_path, case)
    samples = [sample(ids, 4) for ids in documents(tmp_path)]
    found = scored(model, samples, policy=policy)
    wanted = {
        site: counted_by_hand(model, site, *asked, policy)
        for site, asked in what_routers_read(model, samples).items()
    }
    assert found.confusion.keys() == wanted.keys()
    for site, counts in found.confusion.items():
        assert counts.tolist() == wanted[site], site


def what_routers_read(model: MomaModel, samples: list[Sample]) -> dict[str, tuple[Tensor, Tensor]]:
    """By router: hidden states [T, D] and eligible tokens [T], in the oracle's pass."""
    read: dict[str, tuple[Tensor, Tensor]] = {}

    class Spy:
        def experts(self, layer: int, group: str, u: Tensor, logits: Tensor, *rest: Tensor) -> None:
            read[f"{layer}.{group}"] = (u.clone(), rest[0].clone())

        def depth(self, layer: int, x: Tensor, logits: Tensor, *rest: Tensor) -> None:
            read[f"{layer}.depth"] = (x.clone(), rest[0].clone())

    with torch.no_grad():
        model(forward_batch(model.config, rows_of(samples), observer=Spy()))
    return read


def counted_by_hand(
    model: MomaModel, site: str, x: Tensor, eligible: Tensor, policy: RoutingPolicy
) -> list[list[int]]:
    """[E][4]: true positives, false positives, false negatives, true negatives."""
    router = named_routers(model)[site]
    aux = router.aux
    assert aux is not None
    assert router.threshold_logits is not None
    places = [t for t in range(len(x)) if eligible[t]]
    weight, states = router.weight.detach().double().numpy(), x.double().numpy()
    first, second = (layer.weight.detach().double().numpy() for layer in (aux.fc1, aux.fc2))
    counts = []
    for expert in range(len(weight)):
        scores = {t: float(weight[expert] @ states[t]) for t in places}
        share = 1 / len(weight) if router.capacity is None else router.capacity
        size = max(1, math.floor(len(places) * share))
        best = sorted(places, key=lambda t: -scores[t])[:size]
        cells = [0, 0, 0, 0]
        for t in places:
            if policy is CAUSAL:
                inner = first @ states[t]
                says = float(second[expert] @ (inner / (1 + np.exp(-inner)))) > 0
            else:
                says = scores[t] > float(router.threshold_logits[expert])
            cells[{(1, 1): 0, (0, 1): 1, (1, 0): 2, (0, 0): 3}[t in best, says]] += 1
        counts.append(cells)
    return counts


@pytest.mark.parametrize("case", CASES)
def test_losses_of_one_sample_against_float64(case: str, tmp_path: Path) -> None:
    """Expert choice over a batch of one, and each way in which it may have been served."""
    model = tiny(tmp_path, case)
    config, weights = reference.load_checkpoint(tmp_path)
    for ids, start in zip(documents(tmp_path), STARTS, strict=True):
        for routing, prompt_routing, name, prompt_len in (
            (CAUSAL, CAUSAL, "causal", None),
            (CALIBRATED, CALIBRATED, "calibrated", None),
            (CAUSAL, WHOLE, "expert_choice", start),
        ):
            found = scored(model, [sample(ids, start, routing, prompt_routing)])
            slow: Any = {
                EXPERT_CHOICE: ("expert_choice", None),
                SERVED: (name, prompt_len),
            }
            for which, (policy, length) in slow.items():
                logits = reference.forward(config, weights, ids, policy, prompt_len=length)
                table, sums = reference.log_probs(logits), [0.0, 0.0, 0.0, 0.0]
                for t in range(start, len(ids)):
                    column = int(reference.modality_of(config, ids[t]) == "image")
                    sums[column] -= table[t - 1, ids[t]]
                    sums[2 + column] += 1
                assert found.losses[which].tolist() == pytest.approx(sums, rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_what_the_report_would_say_of_it(case: str, tmp_path: Path) -> None:
    """The lab's own pass over the same rows, with its mask of all pairs."""
    model = tiny(tmp_path, case)
    samples = [sample(ids, start) for ids, start in zip(documents(tmp_path), STARTS, strict=True)]
    found = scored(model, samples)
    wanted = Lab(model).run(rows_of(samples), ORACLE, 0).losses.sum(0)
    assert found.losses[EXPERT_CHOICE].tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    alone = [scored(model, [each]).losses[SERVED] for each in samples]
    assert found.losses[SERVED].tolist() == pytest.approx(np.sum(alone, axis=0).tolist(), rel=1e-4)
    assert found.num_requests == 3
    assert found.num_tokens == sum(each.num_tokens for each in samples)
    config, _ = reference.load_checkpoint(tmp_path)
    images = sum(
        reference.modality_of(config, int(token)) == "image"
        for each in samples
        for token in each.token_ids
    )
    assert found.by_modality == {"text": found.num_tokens - images, "image": images}


def test_a_kind_with_too_few_tokens_is_left_out(tmp_path: Path) -> None:
    model = tiny(tmp_path, "4t4i_post")
    samples = [sample(ids, 3) for ids in documents(tmp_path)]
    whole = scored(model, samples)
    fewer, more = sorted(whole.by_modality, key=lambda name: whole.by_modality[name])
    found = scored(model, samples, min_tokens=whole.by_modality[fewer] + 1)
    assert {site.partition(".")[2] for site in whole.confusion} == {fewer, more}
    assert {site.partition(".")[2] for site in found.confusion} == {more}
    column = ("text", "image").index(fewer)
    for sums in found.losses.values():
        assert sums[column] == sums[2 + column] == 0
        assert sums[1 - column] > 0
        assert sums[3 - column] > 0
    assert found.by_modality == whole.by_modality  # they were computed all the same


def test_tokens_that_no_router_chooses_among_are_always_told_of(tmp_path: Path) -> None:
    """Words are routed, in experts and depth; pictures have one expert and skip no layer."""
    model = tiny(tmp_path, "depth_text_only_pre")
    samples = [sample(ids, 3) for ids in documents(tmp_path)]
    found = scored(model, samples, min_tokens=10**6)
    assert not found.confusion
    whole = scored(model, samples)
    assert {site.partition(".")[2] for site in whole.confusion} == {"words", "depth"}
    for which, sums in found.losses.items():
        assert sums[[0, 2]].tolist() == [0, 0]
        assert sums[[1, 3]].tolist() == whole.losses[which][[1, 3]].tolist()
        assert sums[3] > 0


def test_it_can_be_given_up_between_any_two_pieces(tmp_path: Path) -> None:
    model = tiny(tmp_path, "depth_4t4i_post")
    samples = [sample(documents(tmp_path, 1)[0])]
    calls = 0

    class EnoughError(Exception):
        pass

    def count() -> None:
        nonlocal calls
        calls += 1

    scored(model, samples, pause=count)
    assert calls >= 2 * len(named_routers(model))
    for last in range(1, calls + 1):
        left = iter(range(last))

        def stop(left: Any = left, last: int = last) -> None:
            if next(left) == last - 1:
                raise EnoughError

        with pytest.raises(EnoughError):
            scored(model, samples, pause=stop)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tiny(tmp_path, "depth_4t4i_post")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scored(model, [sample(ids) for ids in documents(tmp_path)])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
