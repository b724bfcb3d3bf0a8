"""A momaserve shape in the words of other engines: Llama for one expert, Mixtral for more.

Neither has our norms on queries and keys (0.02 % of the weights of moma-435m-dense) nor auxiliary
routers; everything else is of the same size. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from momaserve.errors import ConfigError
from momaserve.models.config import ModelConfig


def peer_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of the Llama or Mixtral with the dimensions of `config`.

    Groups of experts become one: Mixtral's E is the sum, and each token takes the best one, which
    is what ours takes on average.

    Raises:
        ConfigError: a shape that neither can have: depth routing, or experts of different sizes.
    """
    sizes = {group.intermediate_size for group in config.expert_groups}
    if config.depth_routing is not None:
        raise ConfigError("no other engine has depth routing; choose a shape without it")
    if len(sizes) != 1:
        raise ConfigError(f"a Mixtral has experts of one size, got {sorted(sizes)}")
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": sizes.pop(),
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "torch_dtype": "bfloat16",
    }
    if config.num_experts == 1:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "mlp_bias": False,
            **shared,
        }
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": 1,
        "sliding_window": None,
        "router_aux_loss_coef": 0.0,
        **shared,
    }


def peer_tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a checkpoint of `peer_config`, layer by layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    experts = config.get("num_local_experts")
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        yield f"{name}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{name}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{name}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{name}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{name}.input_layernorm.weight", (hidden,)
        yield f"{name}.post_attention_layernorm.weight", (hidden,)
        if experts is None:
            yield f"{name}.mlp.gate_proj.weight", (inner, hidden)
            yield f"{name}.mlp.up_proj.weight", (inner, hidden)
            yield f"{name}.mlp.down_proj.weight", (hidden, inner)
            continue
        yield f"{name}.block_sparse_moe.gate.weight", (experts, hidden)
        for expert in range(experts):
            one = f"{name}.block_sparse_moe.experts.{expert}"
            yield f"{one}.w1.weight", (inner, hidden)
            yield f"{one}.w3.weight", (inner, hidden)
            yield f"{one}.w2.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def num_parameters(config: dict[str, Any]) -> int:
    return sum(prod(shape) for _, shape in peer_tensors(config))
