"""What a model costs: parameters by part, bytes, and work per token, without building it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.weights import STORED_DTYPES, read_headers, tensor_specs

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Our names of stored dtypes, and those of safetensors headers."""

AUXILIARY_ROUTERS = "auxiliary routers"
THRESHOLDS = "router thresholds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tensors of one purpose, over all layers."""

    name: str
    parameters: int
    stored_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCost:
    """Mean work of one token of a modality in a context of `context` tokens of its kind."""

    modality: str
    active_parameters: int
    """Weights that this token meets, its row of the embedding and the head included."""
    linear_flops: int
    attention_flops: int
    kv_bytes: int
    """K/V that the token writes; layers that skip it write none."""

    @property
    def flops(self) -> int:
        return self.linear_flops + self.attention_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Sizes of a model and the cost of its tokens; made by `describe`."""

    parts: tuple[Part, ...]
    num_parameters: int
    """Of the main model, as papers count: without auxiliary routers and thresholds."""
    num_stored_parameters: int
    stored_bytes: int
    stored_dtypes: tuple[str, ...]
    compute_dtype: str
    """Of weights and K/V under `--dtype auto`: the embedding's."""
    context: int
    """Tokens of context that `attention_flops` is for."""
    kv_bytes_per_token: int
    """K/V of a token that no layer skips: what a cache must have room for."""
    costs: tuple[TokenCost, ...]
    """One for each modality of the vocabulary."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON object; the keys are the fields' names, and `flops` is added to each cost."""
        data = asdict(self)
        for values, cost in zip(data["costs"], self.costs, strict=True):
            values["flops"] = cost.flops
        return data


def _part_of(name: str, config: ModelConfig) -> str:
    """The part of the model that a tensor of `tensor_specs` belongs to."""
    if name == "model.embed_tokens.weight":
        return "embedding"
    if name == "lm_head.weight":
        return "head"
    if name.endswith(".threshold"):
        return THRESHOLDS
    if ".aux_router." in name or ".depth_router.aux." in name:
        return AUXILIARY_ROUTERS
    if name.endswith(".depth_router.weight"):
        return "depth routers"
    if name.endswith(".router.weight"):
        return "routers"
    if name.endswith("_proj.weight"):
        return "attention"
    for group in config.expert_groups:
        if f".experts.{group.name}." in name:
            return _experts_of(group.name)
    return "norms"


def _part_names(config: ModelConfig) -> list[str]:
    """All parts that `_part_of` can name, in the order of reports."""
    experts = [_experts_of(group.name) for group in config.expert_groups]
    routers = ["routers", "depth routers", AUXILIARY_ROUTERS, THRESHOLDS]
    return ["embedding", "head", "attention", "norms", *experts, *routers]


def _experts_of(group: str) -> str:
    return f"experts ({group})"


def describe(
    config: ModelConfig,
    *,
    stored: Mapping[str, str] | None = None,
    dtype: str = "bfloat16",
    context: int | None = None,
) -> ModelInfo:
    """Sizes and costs of a model of this configuration.

    With L layers, a token of modality m does

        linear_flops    = 2 * (head + sum over layers of
                               d_l + s_l * (attention + experts_l + routers_l))
        attention_flops = 4 * H * K * sum over layers of s_l * (s_l * context)

    where a weight matrix counts its parameters and each of these multiplies and adds once:
    `attention` the four projections; `experts_l` one expert of m's group (E experts of capacity
    1 / E are one on average); `routers_l` the group's router and auxiliary router, if E > 1;
    `d_l` the depth router and its auxiliary one; `s_l` the share of m's tokens that layer l
    takes, 1 without a depth router. Scores and weighted values are a multiply-add each for
    every head coordinate of every visible token, hence the 4. Norms, activations and RoPE are
    left out. The head counts although most prompt tokens skip it. Auxiliary routers count where
    the checkpoint has them, since causal selection is the default.

    Args:
        stored: dtype of every tensor that the checkpoint has, by name, as safetensors spells it;
            None describes a model with all tensors, in `dtype`.
        dtype: float32, bfloat16 or float16.
        context: tokens a token attends to, itself included; None is `max_position_embeddings`.

    Raises:
        ConfigError: an unknown dtype or a context that the model cannot have.
    """
    if dtype not in DTYPE_NAMES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {dtype!r}")
    limit = config.max_position_embeddings
    context = limit if context is None else context
    if not 1 <= context <= limit:
        raise ConfigError(f"context must be between 1 and {limit} tokens, got {context}")
    specs = tensor_specs(config)
    if stored is None:
        # Thresholds are always stored in float32 (`weights.stored_tensors`).
        stored = {
            name: "F32" if name.endswith(".threshold") else DTYPE_NAMES[dtype] for name in specs
        }
    sizes = {name: [0, 0] for name in _part_names(config)}
    for name, code in stored.items():
        count = prod(specs[name].shape)
        size = sizes[_part_of(name, config)]
        size[0] += count
        size[1] += count * STORED_DTYPES[code].itemsize
    parts = tuple(
        Part(name=name, parameters=count, stored_bytes=size)
        for name, (count, size) in sizes.items()
        if count
    )
    extra = (AUXILIARY_ROUTERS, THRESHOLDS)
    compute = stored["model.embed_tokens.weight"]
    kv_bytes = 2 * config.num_key_value_heads * config.head_dim * STORED_DTYPES[compute].itemsize
    modalities = list(Modality) if config.image is not None else [Modality.TEXT]
    return ModelInfo(
        parts=parts,
        num_parameters=sum(part.parameters for part in parts if part.name not in extra),
        num_stored_parameters=sum(part.parameters for part in parts),
        stored_bytes=sum(part.stored_bytes for part in parts),
        stored_dtypes=tuple(sorted({_dtype_name(code) for code in stored.values()})),
        compute_dtype=_dtype_name(compute),
        context=context,
        kv_bytes_per_token=kv_bytes * config.num_hidden_layers,
        costs=tuple(
            _token_cost(config, modality, sizes[AUXILIARY_ROUTERS][0] > 0, context, kv_bytes)
            for modality in modalities
        ),
    )


def describe_checkpoint(
    directory: Path, config: ModelConfig, *, context: int | None = None
) -> ModelInfo:
    """`describe` for the tensors that a checkpoint really has; reads the files' headers only.

    Raises:
        CheckpointError: files that cannot be read or do not match `config`.
        ConfigError: a context that the model cannot have.
    """
    stored = {name: code for name, (_, code) in read_headers(directory, config).items()}
    return describe(config, stored=stored, context=context)


def forward_flops(
    config: ModelConfig,
    *,
    num_tokens: Mapping[Modality, int],
    num_visible: Mapping[Modality, int],
    num_logits: int,
) -> int:
    """Work of one forward pass without auxiliary routers, by the formula of `describe`.

    Args:
        num_tokens: tokens of each modality.
        num_visible: pairs of a token of each modality and a token that it attends to, itself
            included: what `context` is there, summed up.
        num_logits: tokens that the head computes; in training those that are learnt.
    """
    head = 2 * config.vocab_size * config.hidden_size
    total = num_logits * head
    for modality, count in num_tokens.items():
        if count:
            cost = _token_cost(config, modality, has_aux=False, context=1, kv_bytes=0)
            total += count * (cost.linear_flops - head)
            total += num_visible[modality] * cost.attention_flops
    return total


def _dtype_name(code: str) -> str:
    return next(name for name, known in DTYPE_NAMES.items() if known == code)


def _token_cost(
    config: ModelConfig, modality: Modality, has_aux: bool, context: int, kv_bytes: int
) -> TokenCost:
    """`kv_bytes` are those of one layer. The formula is in `describe`."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention = 2 * hidden * (width + keys)
    norms = 2 * hidden + (2 * (width + keys) if config.qk_norm else 0)
    group = next(group for group in config.expert_groups if modality in group.modalities)

    def router(outputs: int, aux: int) -> int:
        return outputs * hidden + (aux * (hidden + outputs) if has_aux else 0)

    matrices = attention + 3 * hidden * group.intermediate_size
    if group.has_router:
        matrices += router(group.num_experts, group.aux_hidden_size)
    head = config.vocab_size * hidden
    linear, active = float(head), float(head + 2 * hidden)  # embedding row and final norm
    scores = kept = 0.0
    depth = config.depth_routing
    for layer in range(config.num_hidden_layers):
        capacity = depth.capacity_of(layer) if depth is not None else None
        share = 1.0
        if depth is not None and capacity is not None and modality in depth.modalities:
            share = capacity
            linear += router(1, depth.aux_hidden_size)
            active += router(1, depth.aux_hidden_size)
        linear += share * matrices
        active += share * (matrices + norms)
        scores += share * share
        kept += share
    return TokenCost(
        modality=modality.label,
        active_parameters=round(active),
        linear_flops=round(2 * linear),
        attention_flops=round(4 * width * context * scores),
        kv_bytes=round(kv_bytes * kept),
    )
