"""Small random checkpoints for comparing the engine with the float64 reference.

Routers decide variedly (about one expert per token, some none, some several) and clearly enough
that float32 rounding rarely flips a decision; the reference's `trace` reports the margins.
"""

import json
from itertools import cycle
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Config = dict[str, Any]

IMAGE: Config = {
    "first_token_id": 4,
    "num_codes": 16,
    "tokens_per_image": 4,
    "grid": [2, 2],
    "begin_token_id": 21,
    "end_token_id": 20,
}


def expert_group(name: str, modalities: str, experts: int, hidden: int, aux: int = 16) -> Config:
    """One entry of `expert_groups`; `modalities` are separated by spaces."""
    return {
        "name": name,
        "modalities": modalities.split(),
        "num_experts": experts,
        "intermediate_size": hidden,
        "aux_hidden_size": aux,
    }


DENSE = [expert_group("all", "text image", 1, 85)]
MOE_8X = [expert_group("all", "text image", 8, 85)]
ONE_ONE = [expert_group("text", "text", 1, 85), expert_group("image", "image", 1, 85)]
FOUR_FOUR = [expert_group("text", "text", 4, 85), expert_group("image", "image", 4, 85)]
UNEVEN = [expert_group("words", "text", 3, 45, 20), expert_group("codes", "image", 1, 70)]
TABLE = {
    "dense": DENSE,
    "moe_8x": MOE_8X,
    "1t1i": ONE_ONE,
    "4t4i": FOUR_FOUR,
    "uneven": UNEVEN,
}
DEPTH: Config = {"layers": [0, 2], "capacity": 0.25, "aux_hidden_size": 16}
GQA: Config = {"heads": 6, "kv_heads": 2}  # 6 heads of 8: H * K is not D

CASES: dict[str, dict[str, Any]] = {
    f"{name}_{norm_order}": {"groups": groups, "norm_order": norm_order}
    for name, groups in TABLE.items()
    for norm_order in ("post", "pre")
} | {
    "gqa_post": {"groups": FOUR_FOUR, **GQA},
    "gqa_pre": {"groups": FOUR_FOUR, "norm_order": "pre", **GQA},
    "tied_post": {"groups": FOUR_FOUR, "tie": True},
    "tied_pre": {"groups": MOE_8X, "norm_order": "pre", "tie": True},
    "no_qk_norm_pre": {"groups": DENSE, "norm_order": "pre", "qk_norm": False, **GQA},
    "no_image_post": {"groups": MOE_8X, "image": None},
    "depth_dense_pre": {"groups": DENSE, "norm_order": "pre", "layers": 4, "depth": DEPTH},
    "depth_4t4i_post": {"groups": FOUR_FOUR, "layers": 4, "depth": DEPTH},
    "depth_4t4i_pre": {"groups": FOUR_FOUR, "norm_order": "pre", "layers": 4, "depth": DEPTH},
    "depth_list_post": {
        "groups": MOE_8X,
        "layers": 4,
        "depth": {**DEPTH, "layers": [1, 2, 3], "capacity": [0.3, 0.5, 0.7]},
        **GQA,
    },
    "depth_image_only_post": {
        "groups": FOUR_FOUR,
        "layers": 4,
        "depth": {**DEPTH, "capacity": 0.5, "modalities": ["image"]},
    },
    "depth_text_only_pre": {
        "groups": UNEVEN,
        "norm_order": "pre",
        "layers": 4,
        "depth": {**DEPTH, "capacity": 0.5, "modalities": ["text"]},
    },
}
"""Arguments of `random_checkpoint` for every row of the contract's tables worth a test."""


def random_checkpoint(
    directory: str | Path,
    *,
    seed: int,
    groups: list[Config],
    norm_order: str = "post",
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int = 8,
    qk_norm: bool = True,
    tie: bool = False,
    depth: Config | None = None,
    image: Config | None = IMAGE,
    vocab: int = 64,
    max_positions: int = 256,
    aux_routers: bool = True,
    thresholds: bool = True,
) -> Config:
    """Write a checkpoint of random float32 weights; returns its configuration.

    Router logits have a standard deviation near 2. Auxiliary routers and thresholds select an
    expert for about 1 token in E and a depth-routed layer for its capacity; the main routers have
    no offset, so under `threshold` each expert takes about half of all tokens.
    """
    config: Config = {
        "model_type": "moma",
        "format_version": 1,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "head_dim": head_dim,
        "norm_order": norm_order,
        "rms_norm_eps": 1e-5,
        "qk_norm": qk_norm,
        "rope_theta": 10000.0,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": tie,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "image": image,
        "expert_groups": groups,
        "depth_routing": depth,
    }
    rng = np.random.default_rng(seed)
    sample = 1.5 * rng.standard_normal(10_000)
    sample /= 1.0 + np.exp(-sample)  # what silu makes of an auxiliary router's first product
    weights: dict[str, NDArray[np.float64]] = {}

    def normal(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        weights[name] = mean + std * rng.standard_normal(shape)

    def router(name: str, aux: str, rows: int, aux_hidden: int, rms: float, rate: float) -> None:
        """`rms` is the size of what the router reads, `rate` the share it should select."""
        cut = 2.0 * NormalDist().inv_cdf(1.0 - rate)
        normal(f"{name}.weight", rows, hidden, std=2.0 / rms / hidden**0.5)
        if thresholds:
            logits = cut + 0.3 * rng.standard_normal(rows)
            weights[f"{name}.threshold"] = 1.0 / (1.0 + np.exp(-logits))
        if aux_routers:  # no bias: the offset comes from the mean of silu, which is not zero
            normal(f"{aux}.fc1.weight", aux_hidden, hidden, std=1.5 / rms / hidden**0.5)
            free = rng.standard_normal((rows, aux_hidden)) * 2.0 / sample.std() / aux_hidden**0.5
            free -= free.mean(axis=1, keepdims=True)
            weights[f"{aux}.fc2.weight"] = free - cut / sample.mean() / aux_hidden

    embed_std = 2.0 / hidden**0.5 if tie else 1.0
    normal("model.embed_tokens.weight", vocab, hidden, std=embed_std)
    for i in range(layers):
        layer = f"model.layers.{i}"
        for part, count in (("q", heads), ("k", kv_heads or heads), ("v", kv_heads or heads)):
            width = count * head_dim
            normal(f"{layer}.self_attn.{part}_proj.weight", width, hidden, std=hidden**-0.5)
            if qk_norm and part != "v":
                norm = f"{layer}.self_attn.{part}_norm"
                normal(f"{norm}.weight", count, head_dim, std=0.2, mean=1.0)
                normal(f"{norm}.bias", count, head_dim, std=0.2)
        width = heads * head_dim
        normal(f"{layer}.self_attn.o_proj.weight", hidden, width, std=width**-0.5)
        normal(f"{layer}.attn_norm.weight", hidden, std=0.1, mean=1.0)
        normal(f"{layer}.ffn_norm.weight", hidden, std=0.1, mean=1.0)
        # Post order adds about 2 to the mean square of x in a layer, pre order about 0.6.
        x_rms = (embed_std**2 + i * (2.0 if norm_order == "post" else 0.6)) ** 0.5
        u_rms = (x_rms**2 + 1.0) ** 0.5 if norm_order == "post" else 1.0
        for group in groups:
            experts, inner = group["num_experts"], group["intermediate_size"]
            prefix = f"{layer}.experts.{group['name']}"
            normal(f"{prefix}.gate_proj", experts, inner, hidden, std=hidden**-0.5)
            normal(f"{prefix}.up_proj", experts, inner, hidden, std=hidden**-0.5)
            normal(f"{prefix}.down_proj", experts, hidden, inner, std=inner**-0.5)
            if experts > 1:
                aux, width = f"{prefix}.aux_router", group["aux_hidden_size"]
                router(f"{prefix}.router", aux, experts, width, u_rms, 1.0 / experts)
        if depth is not None and i in depth["layers"]:
            share = depth["capacity"]
            if isinstance(share, list):
                share = share[depth["layers"].index(i)]
            prefix = f"{layer}.depth_router"
            router(prefix, f"{prefix}.aux", 1, depth["aux_hidden_size"], x_rms, share)
    normal("model.norm.weight", hidden, std=0.1, mean=1.0)
    if not tie:
        normal("lm_head.weight", vocab, hidden, std=2.0 * hidden**-0.5)

    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {name: np.ascontiguousarray(w, dtype=np.float32) for name, w in weights.items()}
    save_file(tensors, root / "model.safetensors")
    return config


def sample_ids(config: Config, seed: int, *, pictures: int = 2, words: int = 8) -> list[int]:
    """bos, then `words` text ids before, between and after `pictures` whole pictures.

    No word or code comes twice while the vocabulary lasts. Where the tokens that a layer takes
    begin with a run of one id, attention returns the same value for each of them, and expert
    choice has a tie that only rounding breaks.
    """
    rng = np.random.default_rng(seed)
    image = config["image"]
    special = {config[f"{name}_token_id"] for name in ("bos", "pad", "eos")}
    codes: list[int] = []
    if image is not None:
        special |= {image["begin_token_id"], image["end_token_id"]}
        codes = [image["first_token_id"] + code for code in range(image["num_codes"])]
    plain = [t for t in range(config["vocab_size"]) if t not in special and t not in codes]
    next_word, next_code = cycle(rng.permutation(plain)), cycle(rng.permutation(codes))

    ids = [int(config["bos_token_id"]), *(int(next(next_word)) for _ in range(words))]
    for _ in range(pictures):
        if image is not None:
            ids.append(image["begin_token_id"])
            ids += [int(next(next_code)) for _ in range(image["tokens_per_image"])]
            ids.append(image["end_token_id"])
        ids += [int(next(next_word)) for _ in range(words)]
    return ids
