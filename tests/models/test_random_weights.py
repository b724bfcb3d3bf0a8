"""Random models route at the promised rates on ids that they were not made with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from momaserve.config import SERVABLE_POLICIES, RoutingPolicy
from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.presets import preset_config
from momaserve.models.random_weights import RoutingRates, ordinary_token_ids, random_model
from tests.models.factory import CPU, IMAGE, forward, group, make_config, make_model

IMAGE_64 = IMAGE | {"num_codes": 500, "begin_token_id": 505, "end_token_id": 504}
FOUR_FOUR = [group("text", ["text"], 4), group("image", ["image"], 4)]
EIGHT = [group("all", ["text", "image"], 8)]
DEPTH = {"layers": [0, 2, 4], "capacity": [0.25, 0.5, 0.75], "aux_hidden_size": 8}


def small_config(**changes: Any) -> ModelConfig:
    """Six narrow layers over 1500 ids, 500 of them picture codes."""
    wide: dict[str, Any] = {
        "vocab_size": 1500,
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "image": IMAGE_64,
    }
    wide["max_position_embeddings"] = 2048
    return make_config(**wide | {"expert_groups": FOUR_FOUR, "depth_routing": None} | changes)


def fresh_ids(config: ModelConfig, *, rows: int, length: int, seed: int) -> Tensor:
    """Rows of text ids with a run of picture ids in the middle half: [rows, length]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(modality: Modality, count: int) -> Tensor:
        ids = ordinary_token_ids(config, modality)
        return ids[torch.randint(len(ids), (rows, count), generator=generator)]

    if config.image is None:
        return draw(Modality.TEXT, length)
    quarter = length // 4
    text = draw(Modality.TEXT, length - 2 * quarter)
    picture = draw(Modality.IMAGE, 2 * quarter)
    return torch.cat((text[:, :quarter], picture, text[:, quarter:]), dim=1)


def rates(model: MomaModel, ids: Tensor, policy: RoutingPolicy) -> RoutingRates:
    observer = RoutingRates()
    hidden = forward(model, ids, policy, observer)
    assert bool(hidden.isfinite().all())
    return observer


def assert_rates(model: MomaModel, reached: RoutingRates, tolerance: float) -> None:
    config = model.config
    groups = {g.name: 1.0 for g in config.expert_groups if g.has_router}
    assert reached.experts_per_token == pytest.approx(groups, abs=tolerance)
    depth = config.depth_routing
    wanted = {} if depth is None else dict(zip(depth.layers, depth.capacity, strict=True))
    assert reached.depth_rates == pytest.approx(wanted, abs=tolerance)


CASES: dict[str, dict[str, Any]] = {
    "post": {},
    "pre": {"norm_order": "pre"},
    "moe_8x": {"expert_groups": EIGHT},
    "tied_pre": {"expert_groups": EIGHT, "norm_order": "pre", "tie_word_embeddings": True},
    "depth_post": {"depth_routing": DEPTH},
    "depth_pre": {"depth_routing": DEPTH, "norm_order": "pre"},
    "depth_image_only": {"depth_routing": DEPTH | {"modalities": ["image"]}},
    "no_image": {"image": None, "expert_groups": EIGHT},
}


@pytest.mark.parametrize("policy", SERVABLE_POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_rates_on_fresh_ids(case: str, policy: RoutingPolicy) -> None:
    model = make_model(small_config(**CASES[case]))
    ids = fresh_ids(model.config, rows=16, length=256, seed=1000)
    assert_rates(model, rates(model, ids, policy), 0.05)


@pytest.mark.parametrize("case", CASES)
def test_rates_over_the_whole_vocabulary_are_exact(case: str) -> None:
    model = make_model(small_config(**CASES[case]))
    generator = torch.Generator().manual_seed(7)
    parts = [ordinary_token_ids(model.config, modality) for modality in Modality]
    # Text and pictures count alike, so the shorter list is repeated.
    longest = max(len(part) for part in parts)
    parts = [part.repeat(longest // len(part)) for part in parts if len(part)]
    ids = torch.cat([p[torch.randperm(len(p), generator=generator)] for p in parts])
    ids = ids[: len(ids) - len(ids) % 8].view(-1, 8)
    assert_rates(model, rates(model, ids, RoutingPolicy.CAUSAL), 0.01)


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_both_servable_policies_select_alike(norm_order: str) -> None:
    model = make_model(small_config(norm_order=norm_order, depth_routing=DEPTH))
    ids = fresh_ids(model.config, rows=2, length=128, seed=5)
    causal, calibrated = (forward(model, ids, policy) for policy in SERVABLE_POLICIES)
    assert_close(causal, calibrated, rtol=0, atol=0)


def test_rates_do_not_depend_on_the_context() -> None:
    model = make_model(small_config())
    ids = fresh_ids(model.config, rows=8, length=256, seed=6)
    alone = rates(model, ids.view(-1, 1), RoutingPolicy.CAUSAL)
    together = rates(model, ids.view(1, -1), RoutingPolicy.CAUSAL)
    assert alone.experts_per_token == pytest.approx(together.experts_per_token, abs=1e-3)


def test_tokens_spread_over_experts_unevenly() -> None:
    class Spread(RoutingRates):
        counts = torch.zeros(5)

        def experts(
            self,
            layer: int,
            group: str,
            u: Tensor,
            logits: Tensor,
            eligible: Tensor,
            selected: Tensor,
        ) -> None:
            self.counts = self.counts + torch.bincount(selected[eligible].sum(1), minlength=5)

    model = make_model(small_config())
    spread = Spread()
    ids = fresh_ids(model.config, rows=8, length=256, seed=8)
    forward(model, ids, RoutingPolicy.CAUSAL, spread)
    shares = (spread.counts / spread.counts.sum()).tolist()
    assert 0.35 < shares[0] < 0.57  # model.md, section 4: nearly half get no expert
    assert min(shares) > 0.005  # and some get all


def test_narrow_weights_keep_the_rates() -> None:
    config = small_config(norm_order="pre", depth_routing=DEPTH)
    model = random_model(config, seed=4, dtype=torch.bfloat16, device=CPU)
    assert model.embed_tokens.dtype == torch.bfloat16
    assert {router.weight.dtype for router in model.routers()} == {torch.float32}
    ids = fresh_ids(config, rows=16, length=256, seed=9)
    assert_rates(model, rates(model, ids, RoutingPolicy.CALIBRATED), 0.05)


def test_a_preset_reaches_the_rates() -> None:
    config = preset_config("moma-90m-4t4i")
    model = random_model(config, seed=0, dtype=torch.float32, device=CPU)
    ids = fresh_ids(config, rows=2, length=512, seed=2024)
    assert_rates(model, rates(model, ids, RoutingPolicy.CAUSAL), 0.05)
    assert_rates(model, rates(model, ids[:1], RoutingPolicy.CALIBRATED), 0.06)
    logits = model.logits(forward(model, ids[:1, :16], RoutingPolicy.CAUSAL))
    assert 0.5 < float(logits.std()) < 2.0


def test_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (
        random_model(small_config(), seed=seed, dtype=torch.float32, device=CPU)
        for seed in (1, 1, 2)
    )
    for (name, a), (_, b), (_, c) in zip(
        first.state_dict().items(),
        again.state_dict().items(),
        other.state_dict().items(),
        strict=True,
    ):
        assert torch.equal(a, b), name
        is_drawn = not name.endswith(("norm.weight", "norm.bias", "threshold_logits", "fc2.weight"))
        assert torch.equal(a, c) != is_drawn, name


def test_models_are_ready_to_serve() -> None:
    model = make_model(small_config(depth_routing=DEPTH))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(model.missing_for(policy) is None for policy in RoutingPolicy)
    assert model.rope.shape == (2048, 2, 3)


def test_few_ids_are_shared_out_among_experts() -> None:
    # 16 picture codes and 3 experts: 5 or 6 ids each, 16 in all.
    groups = [group("text", ["text"], 1), group("image", ["image"], 3)]
    model = make_model(make_config(expert_groups=groups, depth_routing=None))
    ids = ordinary_token_ids(model.config, Modality.IMAGE).view(1, -1)
    reached = rates(model, ids, RoutingPolicy.CAUSAL)
    assert reached.experts_per_token == {"image": 1.0}


def test_ordinary_ids_leave_out_control_tokens() -> None:
    config = make_config()
    text, image = (ordinary_token_ids(config, modality).tolist() for modality in Modality)
    assert text == [3, *range(22, 40)]
    assert image == list(range(4, 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 3}, "hidden_size of at least 4, got 3"),
        (
            {"expert_groups": [group("all", ["text", "image"], 9)]},
            "aux_hidden_size of at least their 9 outputs, got 8",
        ),
    ],
)
def test_shapes_without_room_for_routing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_model(make_config(**changes))
