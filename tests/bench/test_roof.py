"""Bytes of a step against arithmetic by hand and against `momaserve info`; bandwidth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from momaserve.config import RoutingPolicy
from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.info import THRESHOLDS, describe
from momaserve.models.presets import preset_config
from momaserve_bench.roof import (
    StepBytes,
    StepLoad,
    mean_distinct_experts,
    measure_read_bandwidth,
    step_bytes,
)

TEXT, IMAGE = Modality.TEXT, Modality.IMAGE
CAUSAL = RoutingPolicy.CAUSAL


def config(*groups: tuple[str, tuple[Modality, ...], int], depth: Any = None) -> ModelConfig:
    """Two layers, D 4, 2 heads of 2 over 1 kv head, V 10, F 5, A 3."""
    return ModelConfig.from_dict(
        {
            **preset_config("moma-90m-dense").to_dict(),
            "vocab_size": 10,
            "hidden_size": 4,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 2,
            "max_position_embeddings": 64,
            "image": {
                "first_token_id": 5,
                "num_codes": 5,
                "tokens_per_image": 2,
                "grid": [1, 2],
                "begin_token_id": 3,
                "end_token_id": 4,
            },
            "expert_groups": [
                {
                    "name": name,
                    "modalities": [m.label for m in modalities],
                    "num_experts": count,
                    "intermediate_size": 5,
                    "aux_hidden_size": 3,
                }
                for name, modalities, count in groups
            ],
            "depth_routing": depth,
        }
    )


DENSE = config(("all", (TEXT, IMAGE), 1))
MOE = config(("all", (TEXT, IMAGE), 8))
FOUR_FOUR = config(("text", (TEXT,), 4), ("image", (IMAGE,), 4))

# A layer: projections 4 * (4 + 2 + 2) + 4 * 4 = 48 weights, norms 2 * 4, QK-norms 2 * (4 + 2).
LAYER = 48 + 8 + 12
ATTENTION = 2 * LAYER + 4  # and the norm at the end
EXPERT = 3 * 4 * 5
KV = 2 * 2 * 2  # of a token: K and V, two layers, one head of two


def load(
    num_text: int = 0,
    num_image: int = 0,
    experts: Any = (),
    *,
    context: tuple[int, int] = (0, 0),
    depth: Any = (),
) -> StepLoad:
    return StepLoad(
        num_tokens={TEXT: num_text, IMAGE: num_image},
        context_tokens=dict(zip((TEXT, IMAGE), context, strict=True)),
        expert_tokens=experts,
        depth_tokens=depth,
    )


def test_a_dense_step_by_hand() -> None:
    step = load(2, 1, context=(20, 5))
    assert step_bytes(DENSE, step, itemsize=2, policy=CAUSAL) == StepBytes(
        embedding=2 * 3 * 4,
        attention=2 * ATTENTION,
        experts=2 * 2 * EXPERT,
        routers=0,
        head=2 * 10 * 4,
        kv=2 * KV * 25,
    )


def test_the_head_of_codes_alone_has_codes_alone() -> None:
    found = [step_bytes(DENSE, load(*n), itemsize=2, policy=CAUSAL).head for n in ((0, 3), (1, 3))]
    assert found == [2 * 5 * 4, 2 * 10 * 4]


def test_a_moe_step_counts_the_experts_that_got_a_token() -> None:
    experts = [(0, "all", (1, 0, 0, 2, 0, 0, 0, 0)), (1, "all", (0,) * 8)]
    found = step_bytes(MOE, load(3, experts=experts), itemsize=4, policy=CAUSAL)
    assert found.experts == 4 * 2 * EXPERT  # two in one layer, none in the other
    assert found.routers == 4 * 2 * (8 * 4 + 3 * (4 + 8))
    assert (
        found.total
        == found.weights
        == sum((4 * 3 * 4, 4 * ATTENTION, 4 * 2 * EXPERT, 4 * 2 * 68, 4 * 10 * 4))
    )


def test_a_4t4i_step_leaves_out_the_other_modality() -> None:
    text = [(0, "text", (1, 1, 0, 0)), (1, "text", (2, 0, 0, 0))]
    image = [(0, "image", (1, 1, 1, 1)), (1, "image", (0, 0, 0, 1))]
    router = 4 * 4 + 3 * (4 + 4)
    only_text = step_bytes(FOUR_FOUR, load(2, experts=text), itemsize=2, policy=CAUSAL)
    assert (only_text.experts, only_text.routers) == (2 * 3 * EXPERT, 4 * 2 * router)
    both = step_bytes(FOUR_FOUR, load(2, 4, [*text, *image]), itemsize=2, policy=CAUSAL)
    assert (both.experts, both.routers) == (2 * 8 * EXPERT, 4 * 4 * router)


@pytest.mark.parametrize(
    ("policy", "extra"),
    [
        (RoutingPolicy.CAUSAL, 3 * (4 + 8)),
        (RoutingPolicy.CALIBRATED, 8),
        (RoutingPolicy.THRESHOLD, 0),
    ],
)
def test_what_selection_reads_depends_on_the_policy(policy: RoutingPolicy, extra: int) -> None:
    experts = [(layer, "all", (1,) * 8) for layer in (0, 1)]
    found = step_bytes(MOE, load(1, experts=experts), itemsize=2, policy=policy)
    assert found.routers == 4 * 2 * (8 * 4 + extra)


def test_depth_routing_spares_skipped_layers_and_their_kv() -> None:
    depth = {"layers": [1], "capacity": 0.25, "aux_hidden_size": 3, "modalities": ["text"]}
    routed = config(("all", (TEXT, IMAGE), 1), depth=depth)
    router = 4 + 3 * (4 + 1)
    # Layer 1 takes one of two tokens; a quarter of the words they see is there, all codes are.
    half = load(2, context=(40, 6), depth=[(1, 1, 1)])
    found = step_bytes(routed, half, itemsize=2, policy=CAUSAL)
    assert found.routers == 4 * router
    assert found.kv == 2 * 4 * (46 + (40 / 4 + 6) / 2)
    assert found.attention == 2 * ATTENTION
    none = load(2, context=(40, 6), depth=[(1, 0, 2)])
    found = step_bytes(routed, none, itemsize=2, policy=CAUSAL)
    assert found.routers == 4 * router
    assert found.kv == 2 * 4 * 46
    assert found.attention == 2 * (ATTENTION - LAYER)
    assert found.experts == 2 * EXPERT


@pytest.mark.parametrize("name", ["moma-90m-dense", "moma-90m-moe-8x", "moma-1.4b-4t4i"])
def test_all_experts_together_are_what_info_counts(name: str) -> None:
    model = preset_config(name)
    info = describe(model, dtype="float32")
    experts = [
        (layer, group.name, (1,) * group.num_experts)
        for layer in range(model.num_hidden_layers)
        for group in model.expert_groups
        if group.has_router
    ]
    found = step_bytes(model, load(1, 1, experts), itemsize=4, policy=CAUSAL)
    parts = {part.name: part.stored_bytes for part in info.parts}
    stored = info.stored_bytes - parts["embedding"] - parts.get(THRESHOLDS, 0)
    assert found.weights == stored + 2 * 4 * model.hidden_size
    assert found.head == parts["head"]
    assert found.attention == parts["attention"] + parts["norms"]


def test_means_over_steps() -> None:
    steps = [StepBytes(head=8.0, kv=1.0), StepBytes(head=8.0, kv=4.0)]
    mean = StepBytes.mean(steps)
    assert mean == StepBytes(head=8.0, kv=2.5)
    assert (mean.total, mean.weights) == (10.5, 8.0)
    loads = [
        load(1, experts=[(0, "text", (1, 0)), (1, "text", (1, 1)), (0, "image", (0, 0))]),
        load(1, experts=[(0, "text", (0, 3)), (1, "text", (1, 1))]),
    ]
    assert mean_distinct_experts(loads) == {"text": 1.5, "image": 0.0}
    assert mean_distinct_experts([load(1)]) == {}


def test_bandwidth_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    assert measure_read_bandwidth(1 << 20, threads=1, repeats=1) > 0
    assert torch.get_num_threads() == before


def test_a_buffer_too_small_to_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1048576 bytes, got 1000"):
        measure_read_bandwidth(1000)


def test_a_buffer_too_large_for_the_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="no room for a buffer of"):
        measure_read_bandwidth(1 << 60)


def test_the_configurations_are_what_the_tests_say() -> None:
    assert replace(DENSE, expert_groups=MOE.expert_groups) == MOE
    assert DENSE.qk_norm and not DENSE.tie_word_embeddings
