"""Sizes and work of a model, as plain numbers that a step's time is predicted from."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from momaserve.core.load import StepLoad
from momaserve.modality import Modality
from momaserve.models.config import ExpertGroupConfig, ModelConfig

_OPERATIONS_PER_LAYER = 60
"""Tensor operations of a layer with two routed groups, roughly; each costs its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCosts:
    """The experts of one group, in one layer."""

    modalities: tuple[Modality, ...]
    rates: tuple[float, ...]
    """Of each expert: the share of the group's tokens that it takes."""
    expert_bytes: float
    pair_flops: float
    """Work of one (token, expert) pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """Layers that are alike: all of them, or those whose depth router takes the same share."""

    num_layers: int
    shares: tuple[float, ...]
    """Of the tokens of each modality, what these layers take."""

    def touched(self, load: StepLoad, rate: float, modalities: tuple[Modality, ...]) -> float:
        """Chance that a weight which takes the share `rate` of these tokens is needed at all."""
        untouched = 1.0
        for modality in modalities:
            untouched *= math.pow(1.0 - self.shares[modality] * rate, load.tokens_of(modality))
        return 1.0 - untouched

    def taken(self, load: StepLoad, modalities: tuple[Modality, ...]) -> float:
        """Expected tokens of these modalities that one of these layers computes."""
        return sum(self.shares[m] * load.tokens_of(m) for m in modalities)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Bytes that a part of the model reads in a step, and its floating-point operations."""

    num_bytes: float
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """What a step reads and computes, given its tokens.

    Weights are read once a step if anything needs them. An expert that takes the share r of a
    group's tokens is touched by n of them with chance 1 - (1 - r)^n.
    """

    groups: tuple[GroupCosts, ...]
    layers: tuple[LayerCosts, ...]
    dense_bytes: float
    """Of a layer's weights that every token of it meets: attention, routers."""
    dense_flops: float
    """Of one token in them."""
    head_bytes: float
    head_flops: float
    """Of one sampled row."""
    code_share: float = 1.0
    """Of the head, what a row takes that chooses among image codes."""
    kv_bytes: float
    """K/V of one token in one layer."""
    visible_flops: float
    """Of one pair of tokens that attend to each other, in one layer."""
    num_operations: int = 0
    """Tensor operations of a step: what its fixed time is made of."""

    def parts(self, load: StepLoad) -> list[Work]:
        """The step's work, in parts that run one after another; the experts' last."""
        every = tuple(Modality)
        dense_bytes = dense_flops = kv_bytes = visible_flops = 0.0
        total = load.text_tokens + load.image_tokens
        for layer in self.layers:
            taken = layer.taken(load, every)
            share = taken / total if total else 0.0
            dense_bytes += layer.num_layers * layer.touched(load, 1.0, every) * self.dense_bytes
            dense_flops += layer.num_layers * taken * self.dense_flops
            kv_bytes += layer.num_layers * share * load.kv_tokens * self.kv_bytes
            visible_flops += (
                layer.num_layers * share * share * load.visible_pairs * self.visible_flops
            )
        word_rows = max(0.0, load.sampled_rows - load.code_rows)
        code_rows = load.sampled_rows - word_rows
        code_share = self.code_share if code_rows else 0.0
        head_share = 1.0 if word_rows else code_share
        head_rows = word_rows + code_rows * code_share
        parts = [
            Work(num_bytes=dense_bytes, flops=dense_flops),
            Work(num_bytes=kv_bytes, flops=visible_flops),
            Work(num_bytes=head_share * self.head_bytes, flops=head_rows * self.head_flops),
        ]
        for group in self.groups:
            parts.append(
                Work(
                    num_bytes=group.expert_bytes * self.distinct_experts(group, load),
                    flops=group.pair_flops * self.routed_pairs(group, load),
                )
            )
        return parts

    def distinct_experts(self, group: GroupCosts, load: StepLoad) -> float:
        """Experts of a group that a step is expected to touch, all layers together."""
        return sum(
            layer.num_layers * layer.touched(load, rate, group.modalities)
            for layer in self.layers
            for rate in group.rates
        )

    def routed_pairs(self, group: GroupCosts, load: StepLoad) -> float:
        """(token, expert) pairs that a step is expected to compute, all layers together."""
        return sum(
            layer.num_layers * layer.taken(load, group.modalities) for layer in self.layers
        ) * sum(group.rates)

    def added_expert_bytes(self, load: StepLoad, modality: Modality) -> float:
        """Bytes of experts that one more token of a modality is expected to bring to a step."""
        group = next(group for group in self.groups if modality in group.modalities)
        return group.expert_bytes * sum(
            layer.num_layers
            * layer.shares[modality]
            * rate
            * (1.0 - layer.touched(load, rate, group.modalities))
            for layer in self.layers
            for rate in group.rates
        )


def model_costs(config: ModelConfig, weight_bytes: int) -> ModelCosts:
    """Costs of a model whose weights and K/V have `weight_bytes` bytes per number.

    Each expert takes 1 / E of its group's tokens, which is its capacity in training, and each
    depth-routed layer its own. Routers are computed in float32 but read as they are stored.
    """
    hidden = config.hidden_size
    width = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    dense = 2 * hidden * (width + keys) + sum(
        _router(group, hidden) for group in config.expert_groups
    )
    head = config.vocab_size * hidden
    return ModelCosts(
        groups=tuple(_group_costs(group, hidden, weight_bytes) for group in config.expert_groups),
        layers=_layer_costs(config),
        dense_bytes=dense * weight_bytes,
        dense_flops=2 * dense,
        head_bytes=head * weight_bytes,
        head_flops=2 * head,
        code_share=1.0 if config.image is None else config.image.num_codes / config.vocab_size,
        kv_bytes=2 * keys * weight_bytes,
        visible_flops=4 * width,
        num_operations=_OPERATIONS_PER_LAYER * config.num_hidden_layers,
    )


def _router(group: ExpertGroupConfig, hidden: int) -> int:
    """Numbers in a group's routers; all tokens of a step pass those of all groups."""
    if not group.has_router:
        return 0
    return group.num_experts * hidden + group.aux_hidden_size * (hidden + group.num_experts)


def _group_costs(group: ExpertGroupConfig, hidden: int, weight_bytes: int) -> GroupCosts:
    expert = 3 * hidden * group.intermediate_size
    return GroupCosts(
        modalities=group.modalities,
        rates=(1 / group.num_experts,) * group.num_experts,
        expert_bytes=expert * weight_bytes,
        pair_flops=2 * expert,
    )


def _layer_costs(config: ModelConfig) -> tuple[LayerCosts, ...]:
    depth = config.depth_routing
    kinds: Counter[tuple[float, ...]] = Counter()
    for layer in range(config.num_hidden_layers):
        capacity = None if depth is None else depth.capacity_of(layer)
        kinds[
            tuple(
                capacity
                if depth is not None and capacity is not None and modality in depth.modalities
                else 1.0
                for modality in Modality
            )
        ] += 1
    return tuple(LayerCosts(num_layers=n, shares=shares) for shares, n in kinds.items())
