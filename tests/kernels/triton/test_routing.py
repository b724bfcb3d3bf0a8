"""Routing kernels against plain torch: mixed modalities and policies, any number of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.kernels import reference_routing
from momaserve.kernels.reference_routing import GroupRouter, Pairs, RouterWeights
from momaserve.kernels.triton import routing
from momaserve.layers.batch import POLICY_CODES
from momaserve.layers.routing import Router
from momaserve.modality import Modality
from tests.kernels.triton.device import DEVICE, DTYPES, randint, randn

TEXT, IMAGE = Modality.TEXT, Modality.IMAGE
GROUPS = {
    "4t4i": (((TEXT,), 4), ((IMAGE,), 4)),
    "moe-8x": (((TEXT, IMAGE), 8),),
    "3t1i": (((TEXT,), 3), ((IMAGE,), 1)),
    "1t1i": (((TEXT,), 1), ((IMAGE,), 1)),
    "2i5t": (((IMAGE,), 2), ((TEXT,), 5)),
}
WIDTH, AUX = 40, 20
"""Sizes that no tile divides."""


def group(
    modalities: tuple[Modality, ...], num_experts: int, seed: int, *, has_aux: bool = True
) -> GroupRouter:
    if num_experts == 1:
        return GroupRouter(modalities=modalities, num_experts=1, main=None)
    return GroupRouter(
        modalities=modalities,
        num_experts=num_experts,
        main=randn(num_experts, WIDTH, seed=seed) / WIDTH**0.5,
        fc1=randn(AUX, WIDTH, seed=seed + 1) / WIDTH**0.5 if has_aux else None,
        fc2=randn(num_experts, AUX, seed=seed + 2) if has_aux else None,
        thresholds=randn(num_experts, seed=seed + 3),
    )


def routers(name: str, *, has_aux: bool = True) -> RouterWeights:
    groups = [
        group(modalities, size, 10 * place, has_aux=has_aux)
        for place, (modalities, size) in enumerate(GROUPS[name])
    ]
    return RouterWeights.stack(groups, WIDTH, torch.device(DEVICE))


def rows(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """u, modality with padding rows among them, and every policy."""
    modality = randint(-1, 2, count, seed=seed + 1).to(torch.int8)
    policy = randint(0, len(RoutingPolicy), count, seed=seed + 2).to(torch.int8)
    return randn(count, WIDTH, seed=seed), modality, policy


def assert_equal(got: Pairs, wanted: Pairs) -> None:
    count = int(wanted.offsets[-1])
    assert torch.equal(got.offsets, wanted.offsets)
    assert torch.equal(got.places, wanted.places)
    assert torch.equal(got.tokens[:count], wanted.tokens[:count])
    torch.testing.assert_close(got.weights[:count], wanted.weights[:count], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("count", [1, 4, 21])
def test_every_row_routes_by_its_modality_and_policy(name: str, count: int) -> None:
    weights, (u, modality, policy) = routers(name), rows(count, seed=count)
    taken = randint(0, 4, count, seed=5) > 0
    chosen = randint(0, 2, count, weights.num_experts, seed=6) > 0
    got = routing.route(u, modality, policy, weights, taken=taken, chosen=chosen)
    wanted = reference_routing.route(u, modality, policy, weights, taken=taken, chosen=chosen)
    assert_equal(got, wanted)


@pytest.mark.parametrize("count", [64, 65, 130])
def test_rows_of_several_tiles_make_one_list(count: int) -> None:
    weights, (u, modality, policy) = routers("4t4i"), rows(count, seed=count)
    wanted = reference_routing.route(u, modality, policy, weights)
    assert_equal(routing.route(u, modality, policy, weights), wanted)


@pytest.mark.parametrize("count", [3, 30])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_scores_are_those_of_float32(count: int, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Also where u and the stored first layer are narrow: their products are exact."""
    weights = routers("4t4i")
    weights = replace(weights, fc1=weights.fc1.to(stored))
    u, modality, _ = rows(count, seed=9)
    u = u.to(dtype)
    policy = torch.full_like(modality, reference_routing.CAUSAL)
    wide = replace(weights, fc1=weights.fc1.float())
    wanted = reference_routing.route(u.float(), modality, policy, wide)
    assert_equal(routing.route(u, modality, policy, weights), wanted)


@pytest.mark.parametrize("count", [2, 17])
def test_one_modality_leaves_the_other_experts_empty(count: int) -> None:
    """And does not read their weights, or what other rows would have been."""
    weights, (u, _, policy) = routers("4t4i"), rows(count, seed=3)
    modality = torch.full_like(policy, int(IMAGE))
    wanted = reference_routing.route(u, modality, policy, weights)
    weights.fc1[0], weights.main[:4], weights.fc2[:4] = torch.nan, torch.nan, torch.nan
    got = routing.route(u, modality, policy, weights)
    assert_equal(got, wanted)
    assert got.offsets[:5].tolist() == [0] * 5


@pytest.mark.parametrize("count", [3, 20])
def test_padding_and_skipped_rows_select_nothing_whatever_they_hold(count: int) -> None:
    weights, (u, modality, policy) = routers("moe-8x"), rows(count, seed=4)
    taken = torch.ones(count, dtype=torch.bool, device=DEVICE)
    modality[0], taken[1] = -1, False
    wanted = reference_routing.route(u, modality, policy, weights, taken=taken)
    u[0], u[1] = torch.nan, torch.inf
    got = routing.route(u, modality, policy, weights, taken=taken)
    assert_equal(got, wanted)
    assert (got.places[:2] == -1).all()


@pytest.mark.parametrize("count", [20, 70])
def test_a_weight_that_is_no_number_is_a_pair_like_others(count: int) -> None:
    """Expert choice takes a row whose scores are NaN; its own request is to end, no other."""
    weights, (u, modality, policy) = routers("moe-8x"), rows(count, seed=5)
    modality[7], policy[7] = 0, POLICY_CODES[RoutingPolicy.EXPERT_CHOICE]
    chosen = randint(0, 2, count, weights.num_experts, seed=6) > 0
    chosen[7] = True
    u[7] = torch.nan
    pairs = routing.route(u, modality, policy, weights, chosen=chosen)
    num_pairs = int(pairs.offsets[-1])
    assert num_pairs == int((pairs.places >= 0).sum())
    assert sorted(pairs.places[pairs.places >= 0].tolist()) == list(range(num_pairs))
    tokens = pairs.tokens[:num_pairs]
    assert (tokens == 7).sum() == weights.num_experts
    assert torch.isnan(pairs.weights[:num_pairs]).equal(tokens == 7)


def test_no_rows_are_no_pairs() -> None:
    weights, (u, modality, policy) = routers("4t4i"), rows(0, seed=0)
    got = routing.route(u, modality, policy, weights)
    assert got.offsets.tolist() == [0] * 9
    assert len(got.tokens) == 0


@pytest.mark.parametrize("count", [1, 18])
def test_without_auxiliary_routers_thresholds_select(count: int) -> None:
    weights, (u, modality, _) = routers("4t4i", has_aux=False), rows(count, seed=7)
    policy = torch.full_like(modality, reference_routing.CALIBRATED)
    modality.fill_(int(TEXT))
    wanted = reference_routing.route(u, modality, policy, weights)
    assert_equal(routing.route(u, modality, policy, weights), wanted)
    causal = torch.full_like(policy, reference_routing.CAUSAL)
    assert routing.route(u, modality, causal, weights).offsets[-1] == 0


def test_rows_may_have_gaps_between_them() -> None:
    weights, (u, modality, policy) = routers("4t4i"), rows(6, seed=8)
    wide = torch.full((6, WIDTH + 5), torch.nan, device=DEVICE)
    wide[:, :WIDTH] = u
    wanted = reference_routing.route(u, modality, policy, weights)
    assert_equal(routing.route(wide[:, :WIDTH], modality, policy, weights), wanted)


def test_buffers_are_written_in_place_and_nothing_beyond_the_last_pair() -> None:
    weights, (u, modality, policy) = routers("4t4i"), rows(9, seed=2)
    out = Pairs.empty(9, 8, 4, torch.device(DEVICE))
    out.tokens.fill_(-7)
    got = routing.route(u, modality, policy, weights, out=out)
    assert got is out
    count = int(out.offsets[-1])
    assert 0 < count < 36
    assert (out.tokens[count:] == -7).all() and (out.tokens[:count] >= 0).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    weights, (u, modality, policy) = routers("4t4i"), rows(5, seed=1)
    with pytest.raises(ValueError, match=r"modality must be .*int8 \[5\]"):
        routing.route(u, modality[:4], policy, weights)
    with pytest.raises(ValueError, match="modality must be"):
        routing.route(u, modality.int(), policy, weights)
    with pytest.raises(ValueError, match="chosen must be"):
        chosen = torch.zeros(5, 7, dtype=torch.bool, device=DEVICE)
        routing.route(u, modality, policy, weights, chosen=chosen)
    with pytest.raises(ValueError, match="rows of u must be contiguous"):
        routing.route(u.t().contiguous().t(), modality, policy, weights)


def test_groups_must_serve_each_modality_once() -> None:
    device = torch.device(DEVICE)
    with pytest.raises(ValueError, match="no expert group serves the modality image"):
        RouterWeights.stack([group((TEXT,), 2, 0)], WIDTH, device)
    with pytest.raises(ValueError, match="two expert groups serve the modality text"):
        RouterWeights.stack([group((TEXT, IMAGE), 2, 0), group((TEXT,), 2, 0)], WIDTH, device)
    with pytest.raises(ValueError, match="1 of 2 groups"):
        halves = [group((TEXT,), 2, 0), group((IMAGE,), 2, 0, has_aux=False)]
        RouterWeights.stack(halves, WIDTH, device)


def test_codes_are_those_of_the_batch() -> None:
    assert POLICY_CODES == {
        RoutingPolicy.CAUSAL: reference_routing.CAUSAL,
        RoutingPolicy.CALIBRATED: reference_routing.CALIBRATED,
        RoutingPolicy.EXPERT_CHOICE: reference_routing.EXPERT_CHOICE,
        RoutingPolicy.THRESHOLD: reference_routing.THRESHOLD,
    }


@pytest.mark.parametrize("policy", [RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED])
def test_the_twin_routes_as_the_layers_do(policy: RoutingPolicy) -> None:
    """One group of the stack against the module that serves on other devices."""
    mine = group((TEXT, IMAGE), 5, 30)
    module = Router(WIDTH, AUX, 5).to(DEVICE)
    assert mine.main is not None and mine.fc1 is not None and mine.fc2 is not None
    assert module.aux is not None and mine.thresholds is not None
    module.weight.data = mine.main
    module.aux.fc1.weight.data, module.aux.fc2.weight.data = mine.fc1, mine.fc2
    module.threshold_logits = mine.thresholds
    u = randn(50, WIDTH, seed=31)
    scores = module.scores(u)
    wanted = module.aux(u) > 0 if policy is RoutingPolicy.CAUSAL else scores > mine.thresholds
    modality = torch.zeros(50, dtype=torch.int8, device=DEVICE)
    codes = torch.full_like(modality, POLICY_CODES[policy])
    weights = RouterWeights.stack([mine], WIDTH, torch.device(DEVICE))
    selected, affinities = reference_routing.select(u, modality, codes, weights)
    assert torch.equal(selected, wanted)
    torch.testing.assert_close(affinities, scores.sigmoid())
