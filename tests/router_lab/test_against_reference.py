"""Losses, selections and metrics of whole passes against the slow float64 program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from momaserve.config import RoutingPolicy
from momaserve.models.config import ModelConfig
from momaserve.models.weights import load_model
from momaserve.router_lab.passes import Lab
from momaserve.router_lab.policies import (
    CALIBRATED,
    CAUSAL,
    DEPTH,
    EXPERT_CHOICE,
    EXPERTS,
    POLICIES,
    Capacity,
    Everything,
    Flip,
    Policy,
)
from momaserve.router_lab.selections import (
    AGREEMENTS,
    SERVED,
    RouterScores,
    SelectionCounts,
    auroc,
)
from momaserve.training.packing import PackedRows
from tests.reference import moma_float64 as reference
from tests.router_lab.factory import rows_of

NAMES = (
    "4t4i_post",
    "moe_8x_pre",
    "uneven_post",
    "depth_4t4i_post",
    "depth_list_post",
    "depth_image_only_post",
)
PROMPT = next(policy for policy in POLICIES if policy.is_prompt_scoped)
_CLEAR = 1e-5
"""Decisions nearer to the cut than this may rightly differ in float32."""


class Case:
    """A tiny random checkpoint in both programs, and a few documents."""

    def __init__(self, folder: Path, name: str) -> None:
        self.config = reference.random_checkpoint(folder, seed=5, **reference.CASES[name])
        _, self.weights = reference.load_checkpoint(folder)
        config = ModelConfig.load(folder)
        model = load_model(folder, config, dtype=torch.float32, device=torch.device("cpu"))
        model.set_rope(config.max_position_embeddings)
        self.lab = Lab(model, seed=0)
        self.documents = [
            reference.sample_ids(self.config, seed, pictures=2, words=6 + 3 * seed)
            for seed in range(3)
        ]

    def slow(
        self, ids: Sequence[int], policy: reference.Policy, prompt_len: int | None = None
    ) -> tuple[NDArray[np.float64], dict[str, reference.Decision]]:
        """Losses of tokens 1, 2, ... and every router's decision."""
        trace: list[reference.Decision] = []
        logits = reference.forward(
            self.config, self.weights, ids, policy, prompt_len=prompt_len, trace=trace
        )
        assert min(decision.margin for decision in trace) > _CLEAR, "choose another seed"
        table = reference.log_probs(logits)
        losses = np.array([-table[t - 1, ids[t]] for t in range(1, len(ids))])
        return losses, {_site(decision.router): decision for decision in trace}

    def modalities(self, ids: Sequence[int]) -> list[str]:
        return [reference.modality_of(self.config, token) for token in ids]


def _site(router: str) -> str:
    parts = router.split(".")  # model.layers.0.experts.text.router or ...0.depth_router
    return f"{parts[2]}.depth" if parts[3] == "depth_router" else f"{parts[2]}.{parts[4]}"


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def sums_of(losses: Iterable[float], modalities: Sequence[str]) -> list[float]:
    """One document's losses as `document_losses` has them."""
    found = [0.0, 0.0, 0.0, 0.0]
    for loss, modality in zip(losses, modalities, strict=True):
        column = 0 if modality == "text" else 1
        found[column] += loss
        found[2 + column] += 1
    return found


def slow_selected(decision: reference.Decision, length: int) -> NDArray[np.bool_]:
    """[T, E], False where the router was not asked."""
    table = np.zeros((length, decision.selected.shape[1]), dtype=np.bool_)
    table[decision.positions] = decision.selected
    return table


@pytest.mark.parametrize(
    ("policy", "name"),
    [(EXPERT_CHOICE, "expert_choice"), (CAUSAL, "causal"), (CALIBRATED, "calibrated")],
)
def test_losses_and_selections_of_one_document(
    case: Case, policy: Policy, name: reference.Policy
) -> None:
    """Expert choice over a batch of one document is over that document."""
    for number, ids in enumerate(case.documents):
        found = case.lab.run(rows_of(ids, padding=3), policy, number)
        losses, decisions = case.slow(ids, name)
        wanted = sums_of(losses, case.modalities(ids[1:]))
        assert found.losses.tolist() == [pytest.approx(wanted, rel=1e-4)]
        assert decisions.keys() <= found.sites.keys()
        for site in found.sites.keys() - decisions.keys():  # its layer took no token
            assert not bool(found.sites[site].eligible.any())
        for site, decision in decisions.items():
            selected = found.sites[site].selected.numpy()
            assert np.array_equal(selected[: len(ids)], slow_selected(decision, len(ids))), site
            assert not selected[len(ids) :].any()


def test_causal_documents_in_one_batch_know_nothing_of_each_other(case: Case) -> None:
    found = case.lab.run(rows_of(*case.documents, padding=2), CAUSAL, 0)
    wanted = [
        sums_of(case.slow(ids, "causal")[0], case.modalities(ids[1:])) for ids in case.documents
    ]
    assert found.losses == pytest.approx(np.array(wanted), rel=1e-4)


def test_prompts_are_routed_as_they_are_served(case: Case) -> None:
    """Expert choice over each document's own prompt, though all are in one batch."""
    starts = [7, 9, 20]
    rows = rows_of(*case.documents, learnt_from=starts)
    found = case.lab.run(rows, PROMPT, 0)
    for number, (ids, start) in enumerate(zip(case.documents, starts, strict=True)):
        losses, _ = case.slow(ids, "expert_choice", prompt_len=start)
        wanted = sums_of(losses[start - 1 :], case.modalities(ids[start:]))
        assert found.losses[number].tolist() == pytest.approx(wanted, rel=1e-4)


def test_agreement_and_ranks_of_a_whole_run(case: Case) -> None:
    """The numbers of the table, counted again token by token from the slow program's traces."""
    counts = {policy: SelectionCounts() for policy in SERVED}
    scores = RouterScores()
    slow: dict[tuple[RoutingPolicy, str], list[tuple[bool, bool]]] = {}
    slow_scores: dict[str, list[tuple[float, bool]]] = {}
    for number, ids in enumerate(case.documents):
        rows = rows_of(ids, padding=1)
        oracle = case.lab.run(rows, EXPERT_CHOICE, number, with_scores=True)
        scores.add(oracle.sites)
        for policy in SERVED:
            decided = {
                site: found
                for site, recorded in oracle.sites.items()
                if (found := recorded.decided_by(policy, case.lab.routers[site])) is not None
            }
            counts[policy].add(oracle.sites, decided, rows)
        _, decisions = case.slow(ids, "expert_choice")
        for site, decision in decisions.items():
            recorded = oracle.sites[site]
            for row, position in enumerate(decision.positions):
                for expert, wanted in enumerate(decision.selected[row]):
                    assert recorded.aux is not None
                    threshold = case.lab.routers[site].threshold_logits
                    assert threshold is not None
                    main = float(recorded.logits[position, expert])
                    aux = float(recorded.aux[position, expert])
                    given = {
                        RoutingPolicy.CAUSAL: aux > 0,
                        RoutingPolicy.CALIBRATED: main > float(threshold[expert]),
                        RoutingPolicy.THRESHOLD: main > 0,
                    }
                    kind = site.partition(".")[2]
                    for policy, value in given.items():
                        slow.setdefault((policy, kind), []).append((bool(wanted), value))
                    slow_scores.setdefault(site, []).append((aux, bool(wanted)))
    for (policy, kind), pairs in slow.items():
        found = counts[policy].documents(kind).sum(0)
        hits = sum(a and b for a, b in pairs)
        wrong = [sum(not a and b for a, b in pairs), sum(a and not b for a, b in pairs)]
        assert found.tolist() == [hits, *wrong, len(pairs) - hits - sum(wrong)]
        same = sum(a == b for a, b in pairs) / len(pairs)
        assert float(AGREEMENTS["accuracy"](found)) == pytest.approx(same)
    for site, listed in slow_scores.items():
        aux_scores, labels = scores.of(site, "aux"), scores.of(site, "labels")
        assert aux_scores is not None
        assert labels is not None
        found_auroc = auroc(aux_scores.flatten(), labels.flatten())
        above = [a for a, wanted in listed if wanted]
        below = [a for a, wanted in listed if not wanted]
        if above and below:
            won = sum((a > b) + 0.5 * (a == b) for a in above for b in below)
            assert found_auroc == pytest.approx(won / (len(above) * len(below)))


def same_bits(lab: Lab, rows: PackedRows, first: Policy, second: Policy) -> bool:
    one, two = lab.run(rows, first, 0), lab.run(rows, second, 0)
    sites = all(torch.equal(one.sites[s].selected, two.sites[s].selected) for s in one.sites)
    return sites and np.array_equal(one.losses, two.losses)


@pytest.mark.parametrize("base", [EXPERT_CHOICE, CAUSAL, CALIBRATED])
def test_no_noise_is_the_policy_itself_to_the_bit(case: Case, base: Policy) -> None:
    rows = rows_of(*case.documents, padding=4)
    flips = tuple(Flip(0.0, "uniform", part) for part in (EXPERTS, DEPTH))
    assert same_bits(case.lab, rows, base, Policy("noisy", base.base, flips))


def test_edits_that_restore_the_training_condition(case: Case) -> None:
    rows = rows_of(*case.documents, padding=4)
    again = Policy("again", RoutingPolicy.EXPERT_CHOICE, (Capacity(1.0, EXPERTS),))
    assert same_bits(case.lab, rows, EXPERT_CHOICE, again)


def test_noise_reaches_the_share_that_was_asked_for(case: Case) -> None:
    rows = rows_of(*case.documents, padding=4)
    noisy = Policy("noisy", EXPERT_CHOICE.base, (Flip(0.1, "uniform", EXPERTS),))
    turned, total = case.lab.run(rows, noisy, 0).changed[EXPERTS]
    num_sites = sum(not site.endswith(".depth") for site in case.lab.routers)
    assert abs(turned - 0.1 * total) <= num_sites
    again = case.lab.run(rows, noisy, 0)
    other = case.lab.run(rows, noisy, 1)
    assert np.array_equal(again.losses, case.lab.run(rows, noisy, 0).losses)
    assert not np.array_equal(again.losses, other.losses)


def test_all_experts_and_layers(case: Case) -> None:
    rows = rows_of(case.documents[0], padding=2)
    everything = Policy("all", RoutingPolicy.THRESHOLD, (Everything(),))
    for recorded in case.lab.run(rows, everything, 0).sites.values():
        chosen = recorded.selected[recorded.eligible]
        assert bool(chosen.all())


def test_policies_that_a_checkpoint_cannot_do_are_named(tmp_path: Path) -> None:
    arguments: dict[str, Any] = reference.CASES["4t4i_post"]
    reference.random_checkpoint(tmp_path, seed=0, **arguments, aux_routers=False, thresholds=False)
    config = ModelConfig.load(tmp_path)
    model = load_model(tmp_path, config, dtype=torch.float32, device=torch.device("cpu"))
    lab = Lab(model)
    missing = {policy.name for policy in POLICIES if lab.missing_for(policy) is not None}
    assert missing == {"causal", "expert_choice_prompt", "calibrated"}
