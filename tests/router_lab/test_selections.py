"""Each metric of a router on a case small enough to be counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.layers.routing import Router
from momaserve.router_lab.selections import (
    AGREEMENTS,
    Recorder,
    RouterScores,
    Seen,
    SelectionCounts,
    auroc,
    mean_selected,
    reliability,
    variation,
)
from tests.router_lab.factory import rows_of, seen, table

WANTED = table("x..", "xx.", "...", "..x", ".x.")
GIVEN = table("x..", "x.x", ".x.", "..x", "...")
"""Expert 0: 2 right. Expert 1: 2 missed, 1 added. Expert 2: 1 right, 1 added."""


def logits_of(weights: Tensor) -> Tensor:
    return torch.logit(weights)


def counted(wanted: dict[str, Seen], given: dict[str, Seen]) -> SelectionCounts:
    counts = SelectionCounts()
    counts.add(wanted, given, rows_of([0, 5, 6], [0, 7]))
    return counts


def test_confusion_of_every_expert() -> None:
    counts = counted({"0.text": seen(WANTED)}, {"0.text": seen(GIVEN)})
    confusion = counts.sites["0.text"].confusion
    assert confusion.tolist() == [[2, 0, 0, 3], [0, 1, 2, 2], [1, 1, 0, 3]]
    values = {name: statistic(confusion) for name, statistic in AGREEMENTS.items()}
    assert values["accuracy"].tolist() == [1.0, 0.4, 0.8]
    assert values["precision"].tolist() == [1.0, 0.0, 0.5]
    assert values["recall"].tolist() == [1.0, 0.0, 1.0]
    assert values["f1"].tolist() == pytest.approx([1.0, 0.0, 2 / 3])


def test_counts_of_every_document() -> None:
    """The first document has three tokens, the second two."""
    counts = counted(
        {"0.text": seen(WANTED), "1.text": seen(WANTED)},
        {"0.text": seen(GIVEN), "1.text": seen(WANTED)},
    )
    documents = counts.documents("text")
    assert documents.tolist() == [[2 + 3, 2, 1, 4 + 6], [1 + 2, 0, 1, 4 + 4]]
    assert (
        documents.sum(0).tolist()
        == sum(site.confusion.sum(0) for site in counts.sites.values()).tolist()
    )


def test_experts_per_token_and_tokens_without() -> None:
    counts = counted({"0.text": seen(WANTED)}, {"0.text": seen(GIVEN)})
    assert counts.sites["0.text"].histogram.tolist() == [1, 3, 1, 0]
    assert mean_selected({"0.text": seen(GIVEN), "3.text": seen(WANTED)}) == {"text": (10, 10)}


def test_weight_that_is_missed_and_added() -> None:
    weights = torch.tensor(
        [[0.5, 0.1, 0.1], [0.8, 0.2, 0.3], [0.1, 0.4, 0.1], [0.1, 0.1, 0.6], [0.1, 0.9, 0.1]]
    )
    logits = logits_of(weights)
    counts = counted({"0.text": seen(WANTED, logits)}, {"0.text": seen(GIVEN, logits)})
    selected, missed, added = counts.sites["0.text"].mass.tolist()
    assert selected == pytest.approx(0.5 + 0.8 + 0.2 + 0.6 + 0.9)
    assert missed == pytest.approx(0.2 + 0.9)
    assert added == pytest.approx(0.3 + 0.4)


def test_tokens_that_only_one_pass_decided_on_count_as_not_selected_in_the_other() -> None:
    """Depth routing may give a layer's experts other tokens in another pass."""
    ours = Seen(torch.zeros(3, 1), torch.tensor([True, True, False]), table("x", ".", "."), None)
    theirs = Seen(torch.zeros(3, 1), torch.tensor([False, True, True]), table(".", ".", "x"), None)
    counts = SelectionCounts()
    counts.add({"0.text": ours}, {"0.text": theirs}, rows_of([0, 5, 6]))
    assert counts.sites["0.text"].confusion.tolist() == [[0, 1, 1, 1]]
    assert counts.sites["0.text"].histogram.tolist() == [1, 1]


def test_kinds_that_a_batch_lacks_leave_documents_aligned() -> None:
    counts = SelectionCounts()
    both = {"0.text": seen(WANTED), "0.image": seen(WANTED)}
    counts.add({"0.text": both["0.text"]}, {"0.text": both["0.text"]}, rows_of([0, 5, 6], [0, 7]))
    counts.add(both, both, rows_of([0, 5, 6], [0, 7]))
    counts.add({"0.image": both["0.image"]}, {"0.image": both["0.image"]}, rows_of([0] * 5))
    assert counts.documents("text")[:, 0].tolist() == [3, 2, 3, 2, 0]
    assert counts.documents("image")[:, 0].tolist() == [0, 0, 3, 2, 5]


def test_auroc_by_hand() -> None:
    labels = np.array([True, False, True, False])
    assert auroc(np.array([0.9, 0.8, 0.7, 0.1]), labels) == 0.75
    assert auroc(np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, True, False, False])) == 1.0
    assert auroc(np.array([1.0, 2.0, 3.0, 4.0]), np.array([True, True, False, False])) == 0.0
    assert auroc(np.zeros(4), labels) == 0.5  # ties count half
    assert auroc(np.array([1.0, 1.0, 2.0, 0.0]), labels) == (0.5 + 1 + 1 + 1) / 4
    assert auroc(np.array([1.0, 2.0]), np.array([True, True])) is None


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 12, 80).astype(np.float32)
    labels = generator.random(80) < 0.3
    won = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(float(np.mean(won)), rel=1e-12)


def test_reliability_by_hand() -> None:
    probabilities = np.array([0.0, 0.1, 0.3, 0.9, 1.0])
    labels = np.array([False, True, False, True, True])
    found = reliability(probabilities, labels, num_bins=4)
    assert found.counts.tolist() == [2, 1, 0, 2]
    assert found.probability[[0, 1, 3]] == pytest.approx([0.05, 0.3, 0.95])
    assert found.frequency[[0, 1, 3]].tolist() == [0.5, 0.0, 1.0]
    assert math.isnan(found.probability[2])
    wanted = (2 * 0.45 + 1 * 0.3 + 2 * 0.05) / 5
    assert found.expected_error == pytest.approx(wanted)


def test_a_router_that_is_right_about_its_chances_has_no_calibration_error() -> None:
    probabilities = np.repeat([0.2, 0.7], 10)
    labels = np.array([True] * 2 + [False] * 8 + [True] * 7 + [False] * 3)
    assert reliability(probabilities, labels).expected_error == pytest.approx(0.0, abs=1e-12)


def test_balance_by_hand() -> None:
    assert variation(np.array([5, 5, 5])) == 0.0
    assert variation(np.array([2, 4])) == pytest.approx(1 / 3)
    assert variation(np.array([0, 0, 9])) == pytest.approx(math.sqrt(2))
    assert variation(np.zeros(3)) is None


def test_what_served_policies_decide_from_recorded_scores() -> None:
    router = Router(2, 2, 2)
    router.threshold_logits = torch.tensor([1.0, -1.0])
    logits = torch.tensor([[2.0, -2.0], [0.5, -0.5], [9.0, 9.0]])
    aux = torch.tensor([[-1.0, 1.0], [0.0, 0.1], [9.0, 9.0]])
    eligible = torch.tensor([True, True, False])
    recorded = Seen(logits, eligible, table("..", "..", ".."), aux)

    def decided(policy: RoutingPolicy) -> Tensor:
        found = recorded.decided_by(policy, router)
        assert found is not None
        return found.selected

    assert torch.equal(decided(RoutingPolicy.CAUSAL), table(".x", ".x", ".."))
    assert torch.equal(decided(RoutingPolicy.CALIBRATED), table("x.", ".x", ".."))
    assert torch.equal(decided(RoutingPolicy.THRESHOLD), table("x.", "x.", ".."))
    router.threshold_logits = None
    assert recorded.decided_by(RoutingPolicy.CALIBRATED, router) is None
    bare = Seen(logits, eligible, table("..", "..", ".."), None)
    assert bare.decided_by(RoutingPolicy.CAUSAL, router) is None


def test_padding_is_not_recorded() -> None:
    rows = rows_of([0, 5], padding=2)
    recorder = Recorder(rows)
    everything = torch.ones(4, dtype=torch.bool)
    recorder.experts(
        1,
        "text",
        torch.zeros(4, 2),
        torch.zeros(4, 3),
        everything,
        torch.ones(4, 3, dtype=torch.bool),
    )
    recorder.depth(1, torch.zeros(4, 2), torch.zeros(4), everything, everything)
    assert recorder.sites["1.text"].eligible.tolist() == [True, True, False, False]
    assert int(recorder.sites["1.text"].selected.sum()) == 6
    assert recorder.sites["1.depth"].selected.tolist() == [[True], [True], [False], [False]]


def test_scores_are_gathered_over_batches() -> None:
    scores = RouterScores()
    first = seen(WANTED, torch.arange(15.0).view(5, 3), torch.zeros(5, 3))
    scores.add({"0.text": first})
    scores.add({"0.text": seen(GIVEN, -torch.arange(15.0).view(5, 3)), "2.depth": first})
    labels, main = scores.of("0.text", "labels"), scores.of("0.text", "main")
    assert labels is not None
    assert main is not None
    assert labels.shape == main.shape == (10, 3)
    assert main[5:].min() == -14
    assert scores.of("2.depth", "aux") is not None
    assert scores.sites == ["0.text", "2.depth"]
