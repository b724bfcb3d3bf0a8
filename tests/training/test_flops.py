"""FLOPs of training steps by hand, and against what torch counts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.training.flops import step_flops
from momaserve.training.forward import forward_batch, modalities_of, token_losses
from momaserve.training.packing import PackedAttention, PackedRows
from tests.models.factory import group
from tests.training.factory import draw, make_packer, tiny_config, tiny_model

ONE_ONE = [group("text", ["text"], 1), group("image", ["image"], 1)]


def documents(config: ModelConfig, num_rows: int = 3, length: int = 30) -> PackedRows:
    rng = random.Random(0)
    return make_packer(config).documents(lambda: draw(rng), num_rows, length)


def test_visible_tokens_are_those_of_the_attention_mask() -> None:
    rows = documents(tiny_config())
    mask = PackedAttention(rows)._mask
    assert mask is not None
    assert torch.equal(rows.num_visible(), mask.squeeze(1).sum(2))
    whole = replace(rows, documents=None)
    assert whole.num_visible().tolist() == [list(range(1, 31))] * 3


def test_a_step_by_hand() -> None:
    """D 16, V 40, L 2, H 4, G 2, K 6, F 12, 2 + 2 experts."""
    config = tiny_config()
    rows = documents(config)
    tokens = rows.num_tokens
    matrices = 16 * 24 + 2 * 16 * 12 + 24 * 16 + 3 * 16 * 12 + 2 * 16
    learnt = int((rows.targets >= 0).sum())
    forward = 2 * (2 * tokens * matrices + learnt * 40 * 16)
    forward += 2 * 4 * 24 * int(rows.num_visible().sum())
    assert step_flops(config, rows) == 3 * forward


def test_modalities_cost_what_their_groups_do() -> None:
    wide = [group("text", ["text"], 1), group("image", ["image"], 1, intermediate_size=24)]
    one, other = tiny_config(expert_groups=ONE_ONE), tiny_config(expert_groups=wide)
    rows = documents(one)
    num_image = int((modalities_of(one, rows.token_ids) == int(Modality.IMAGE)).sum())
    assert num_image
    added = 3 * 2 * 2 * (3 * 16 * 12) * num_image
    assert step_flops(other, rows) == step_flops(one, rows) + added


@pytest.mark.parametrize("experts", [1, 2])
def test_torch_counts_the_same_products(experts: int) -> None:
    """All but attention, which not every torch counts."""
    groups = [group("text", ["text"], experts), group("image", ["image"], experts)]
    config = tiny_config(expert_groups=groups)
    model = tiny_model(config)
    rng = random.Random(1)
    rows = make_packer(config).conversation(lambda: draw(rng), 96)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_losses(model, rows, forward_batch(config, rows))
    products = step_flops(config, rows) // 3 - 2 * 4 * 24 * int(rows.num_visible().sum())
    is_image = modalities_of(config, rows.token_ids) == int(Modality.IMAGE)
    counts = (int(is_image.sum()), int((~is_image).sum()))
    # Routers score every token of the batch, and floor(b / E) leaves a remainder out.
    routers = 0 if experts == 1 else 2 * 2 * 96 * 2 * 16
    lost = sum(count % experts for count in counts) * 2 * 2 * 3 * 16 * 12
    counted = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counted.items() if "attention" in str(op))
    assert counter.get_total_flops() - attention == products + routers - lost
