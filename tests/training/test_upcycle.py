"""An upcycled model: what it copies, what it computes before any step, what it refuses."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from momaserve.config import RoutingPolicy
from momaserve.errors import DataError
from momaserve.layers.block import Block
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.training.fit_routers import SelectionRecorder
from momaserve.training.forward import forward_batch
from momaserve.training.packing import PackedRows
from momaserve.training.pretrain import save_model
from momaserve.training.upcycle import check_upcyclable, start_upcycled, upcycled
from tests.models.factory import group
from tests.training.factory import DEPTH, draw, make_packer, tiny_config, tiny_model

ONE_ONE = [group("words", ["text"], 1), group("image", ["image"], 1)]
FOUR_TWO = [group("text", ["text"], 4), group("image", ["image"], 2)]


def configs(**changes: Any) -> tuple[ModelConfig, ModelConfig]:
    return (
        tiny_config(expert_groups=ONE_ONE, **changes),
        tiny_config(expert_groups=FOUR_TWO, **changes),
    )


def make_rows(config: ModelConfig) -> PackedRows:
    rng = random.Random(2)
    return make_packer(config).conversation(lambda: draw(rng), 80)


def pair(**changes: Any) -> tuple[MomaModel, MomaModel]:
    small, large = configs(**changes)
    seed = tiny_model(small)
    return seed, upcycled(seed, large, 5)


@pytest.mark.parametrize("changes", [{}, {"depth_routing": DEPTH}, {"tie_word_embeddings": True}])
def test_every_weight_is_a_copy_but_the_routers(changes: dict[str, Any]) -> None:
    seed, model = pair(**changes)
    theirs, ours = seed.state_dict(), model.state_dict()
    for name, tensor in ours.items():
        if ".experts.groups." in name and not name.endswith("router.weight"):
            assert len(tensor) == (4 if ".groups.0." in name else 2)
            for copy in tensor:
                assert torch.equal(copy, theirs[name][0]), name
        elif ".experts." not in name:
            assert torch.equal(tensor, theirs[name]), name
    routers = [ours[f"blocks.{i}.experts.groups.{g}.router.weight"] for i in (0, 1) for g in (0, 1)]
    assert [tuple(router.shape) for router in routers] == [(4, 16), (2, 16)] * 2
    flat = torch.cat([router.flatten() for router in routers])
    assert len(set(flat.tolist())) == len(flat)
    assert float(flat.std()) == pytest.approx(16**-0.5, rel=0.2)
    assert all(router.aux is None and router.threshold_logits is None for router in model.routers())


@pytest.mark.parametrize("norm_order", ["post", "pre"])
def test_what_a_layer_computes_before_any_step(norm_order: str) -> None:
    """A group gives the seed's expert times the selected affinities. In post-norm order the
    norm takes the factor away: a token with an expert is the seed's, one without passes."""
    seed, model = pair(norm_order=norm_order, num_hidden_layers=1)
    rows = make_rows(model.config)
    recorder = SelectionRecorder(rows)
    batch = forward_batch(model.config, rows, observer=recorder)
    x = torch.randn(80, 16, generator=torch.Generator().manual_seed(0))
    angles = model.rope[batch.positions]
    blocks = seed.blocks[0], model.blocks[0]
    with torch.no_grad():
        theirs, ours = (block(0, x, angles, batch) for block in blocks)
        assert isinstance(blocks[0], Block)
        attended = blocks[0].self_attn(0, blocks[0].attn_norm(x), angles, None, batch)
        post = x + blocks[0].attn_norm(blocks[0].self_attn(0, x, angles, None, batch))
    scale = torch.zeros(80)
    for number, entry in enumerate(recorder.selections):
        is_mine = batch.modality == number
        scale[is_mine] = (entry.logits.sigmoid() * entry.selected).sum(1)
    has_expert = scale > 0
    assert 0 < int(has_expert.sum()) < 80
    if norm_order == "pre":
        h = x + attended
        assert_close(ours - h, scale.unsqueeze(1) * (theirs - h), rtol=1e-4, atol=1e-5)
        return
    assert torch.equal(ours[~has_expert], post[~has_expert])
    assert_close(ours[has_expert], theirs[has_expert], rtol=1e-3, atol=1e-3)


def test_a_post_norm_model_whose_tokens_all_have_experts_is_its_seed() -> None:
    seed, model = pair()
    for router in model.routers():
        router.threshold_logits = torch.full((len(router.weight),), -1e9)
    rows = make_rows(model.config)
    with torch.no_grad():
        wanted = seed(forward_batch(seed.config, rows))
        got = model(forward_batch(model.config, rows, RoutingPolicy.CALIBRATED))
    assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_routers_are_a_function_of_the_seed() -> None:
    small, large = configs()
    seed = tiny_model(small)
    routers = [upcycled(seed, large, s).routers()[0].weight for s in (5, 5, 6)]
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])


def test_a_start_has_the_seeds_weights_and_name(tmp_path: Path) -> None:
    small, large = configs()
    save_model(tiny_model(small), tmp_path / "seed", torch.bfloat16)
    start = start_upcycled(tmp_path / "seed", large, 0)
    assert start.model.config == large
    assert {p.dtype for p in start.model.parameters()} == {torch.float32}
    assert start.origin["checkpoint"] == "seed"
    assert start.origin["upcycled"] is True
    longer = tiny_config(expert_groups=FOUR_TWO, max_position_embeddings=512)
    assert start_upcycled(tmp_path / "seed", longer, 0).model.rope.shape[0] == 512


@pytest.mark.parametrize(
    ("seed_groups", "changes", "message"),
    [
        (FOUR_TWO, {}, r"one expert for each modality \(1t1i\), it has 4 x text, 2 x image"),
        ([group("all", ["text", "image"], 1)], {}, "it has 1 x text.image"),
        (ONE_ONE, {"rope_theta": 5.0}, "another model than the recipe's: rope_theta 10000.0 there"),
        (ONE_ONE, {"expert_groups": [group("all", ["text", "image"], 8)]}, "wants 8 x text.image"),
        (
            ONE_ONE,
            {"expert_groups": [FOUR_TWO[0], group("image", ["image"], 2, intermediate_size=24)]},
            "wants 2 x image of intermediate_size 24, the seed has 12",
        ),
    ],
)
def test_what_cannot_be_upcycled(
    seed_groups: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    seed = tiny_config(expert_groups=seed_groups)
    config = tiny_config(**({"expert_groups": FOUR_TWO} | changes))
    with pytest.raises(DataError, match=message):
        check_upcyclable(seed, config, Path("seed"))
