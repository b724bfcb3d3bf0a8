"""Edits of selections: how many they change, which ones, and that a seed decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from momaserve.kernels import reference
from momaserve.router_lab.policies import (
    DEPTH,
    EXPERTS,
    FLIPS,
    Capacity,
    Cut,
    Everything,
    Flip,
    RandomChoice,
    Rule,
)
from tests.router_lab.factory import site, table

T, E = 40, 5


def selection(seed: int = 0) -> Tensor:
    return torch.rand(T, E, generator=torch.Generator().manual_seed(seed)) < 0.3


def changed(before: Tensor, after: Tensor) -> int:
    return int((before != after).sum())


@pytest.mark.parametrize("kind", FLIPS)
def test_no_noise_changes_nothing(kind: str) -> None:
    before = selection()
    assert torch.equal(Flip(0.0, kind, EXPERTS)(site(torch.zeros(T, E)), before), before)


@pytest.mark.parametrize("share", [0.005, 0.05, 0.2])
@pytest.mark.parametrize("kind", FLIPS)
def test_exactly_the_share_is_turned(kind: str, share: float) -> None:
    before = selection()
    after = Flip(share, kind, EXPERTS)(site(torch.zeros(T, E)), before)
    assert changed(before, after) == share * T * E
    if kind == "drop":
        assert not bool((after & ~before).any())
    if kind == "add":
        assert not bool((before & ~after).any())


def test_a_fraction_of_a_flip_comes_up_as_often_as_it_should() -> None:
    """0.4 % of 200 decisions are 0.8: one flip in four fifths of all batches, else none."""
    before = selection()
    flip = Flip(0.004, "uniform", EXPERTS)
    counts = [
        changed(before, flip(site(torch.zeros(T, E), seed=str(seed)), before))
        for seed in range(500)
    ]
    assert set(counts) == {0, 1}
    assert 370 <= sum(counts) <= 430  # 400 expected, standard deviation 9


def test_flips_are_spread_evenly() -> None:
    before = selection()
    total = torch.zeros(T, E)
    for seed in range(300):
        flipped = Flip(0.1, "uniform", EXPERTS)(site(torch.zeros(T, E), seed=str(seed)), before)
        total += flipped != before
    assert total.sum() == 300 * 20
    assert total.min() >= 10  # 30 expected in each place, standard deviation 5
    assert total.max() <= 54


def test_flips_of_a_share_are_among_those_of_a_larger_one() -> None:
    before = selection()
    one, two = (
        Flip(share, "uniform", EXPERTS)(site(torch.zeros(T, E)), before) != before
        for share in (0.02, 0.1)
    )
    assert bool((one & ~two).sum() == 0)


def test_seeds_routers_and_nothing_else_decide() -> None:
    before, flip = selection(), Flip(0.1, "uniform", EXPERTS)
    first = flip(site(torch.zeros(T, E)), before)
    assert torch.equal(flip(site(torch.zeros(T, E)), before), first)
    assert not torch.equal(flip(site(torch.zeros(T, E), seed="t"), before), first)
    assert not torch.equal(flip(site(torch.zeros(T, E), name="1.text"), before), first)


def test_flips_stop_where_nothing_is_left_to_turn() -> None:
    before = table("x..", "...", ".x.")
    after = Flip(0.9, "drop", EXPERTS)(site(torch.zeros(3, 3)), before)
    assert not bool(after.any())


def test_padding_and_other_routers_are_left_alone() -> None:
    before = selection()
    real = torch.arange(T) < 10
    after = Flip(0.5, "uniform", EXPERTS)(site(torch.zeros(T, E), real=real), before)
    assert changed(before, after) == 25
    assert torch.equal(after[10:], before[10:])
    assert torch.equal(Flip(0.5, "uniform", DEPTH)(site(torch.zeros(T, E)), before), before)
    depth = site(torch.zeros(T, 1), name="0.depth")
    assert changed(before[:, :1], Flip(0.5, "uniform", DEPTH)(depth, before[:, :1])) == 20


def test_random_choice_takes_as_many_as_expert_choice() -> None:
    real = torch.arange(T) < 37
    found = RandomChoice()(site(torch.zeros(T, E), real=real), selection())
    assert found.sum(0).tolist() == [37 // E] * E
    assert not bool(found[37:].any())
    depth = RandomChoice()(site(torch.zeros(T, 1), name="0.depth"), selection()[:, :1])
    assert int(depth.sum()) == T // 2


def test_capacity_of_the_training_condition_and_others() -> None:
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(1))
    real = torch.ones(T, dtype=torch.bool)
    whole = reference.expert_choice(logits, real, torch.zeros(T, dtype=torch.int64), 1, None)
    nothing = torch.zeros(T, E, dtype=torch.bool)
    assert torch.equal(Capacity(1.0, EXPERTS)(site(logits), nothing), whole)
    double = Capacity(2.0, EXPERTS)(site(logits), nothing)
    assert double.sum(0).tolist() == [2 * T // E] * E
    assert bool((double | ~whole).all())
    assert bool(Capacity(100.0, EXPERTS)(site(logits), nothing).all())
    assert torch.equal(Capacity(2.0, DEPTH)(site(logits), nothing), nothing)


def test_cuts_are_those_of_the_router() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, -1.0]])
    mine = {"0.text": torch.tensor([1.0, 0.5])}
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert torch.equal(Cut("main", mine)(site(logits), nothing), table(".x", "x."))
    assert torch.equal(Cut("main", mine)(site(logits, name="1.text"), nothing), nothing)
    here = site(logits)
    assert here.router.aux is not None
    with torch.no_grad():
        for linear in (here.router.aux.fc1, here.router.aux.fc2):
            linear.weight.copy_(torch.eye(2))
        scores = here.router.aux(logits)
        found = Cut("aux", {"0.text": torch.tensor([0.1, 0.1])})(here, nothing)
    assert torch.equal(found, scores > 0.1)
    assert torch.equal(found, table(".x", "x."))


def test_a_rule_keeps_tokens_out_and_counts_what_it_changed() -> None:
    here = site(torch.zeros(4, 2))
    real = torch.tensor([True, True, True, False])
    rule = Rule((Everything(),), {"0.text": here.router, "0.depth": here.router}, real, "s")
    eligible = torch.tensor([True, True, False, True])
    selected = table("x.", "..", "..", "x.")
    found = rule(0, "text", here.x, here.logits, eligible, selected)
    assert torch.equal(found, table("xx", "xx", "..", "xx"))
    assert rule.changed == {EXPERTS: (3, 4)}  # padding is not counted
    rule(0, "depth", here.x, here.logits[:, :1], eligible, selected[:, :1])
    assert rule.changed == {EXPERTS: (3, 4), DEPTH: (1, 2)}
