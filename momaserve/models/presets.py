"""Named model shapes (model.md, section 8): the paper's Table 1 as configurations. Knows no torch.

Presets have no checkpoint: benchmarks fill them with `random_weights.random_model`. The expert
hidden size is floor(8 D / 3), not rounded up to a kernel-friendly multiple, so that parameter
counts are the paper's.
"""

from __future__ import annotations

from typing import Any

from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.config import FORMAT_VERSION, ModelConfig

VOCAB_SIZE = 65536
CONTEXT_LENGTH = 4096
_DEPTH_INTERVAL = 2
_DEPTH_CAPACITY = 0.25
_IMAGE = {
    "first_token_id": 4,
    "num_codes": 8192,
    "tokens_per_image": 1024,
    "grid": [32, 32],
    "begin_token_id": 8197,
    "end_token_id": 8196,
}
_ALL = [modality.label for modality in Modality]

_SIZES: dict[str, tuple[int, int, int, int]] = {
    "90m": (8, 512, 8, 1365),
    "435m": (24, 1024, 16, 2730),
    "1.4b": (24, 2048, 16, 5461),
    "mod-110m": (14, 512, 8, 1365),
    "mod-635m": (40, 1024, 16, 2730),
    "mod-2.3b": (32, 2304, 18, 6144),
}
"""Layers, hidden size, heads, expert hidden size. Names with `mod-` have depth routing."""

_EXPERTS: dict[str, dict[str, tuple[list[str], int]]] = {
    "dense": {"all": (_ALL, 1)},
    "moe-8x": {"all": (_ALL, 8)},
    "1t1i": {label: ([label], 1) for label in _ALL},
    "4t4i": {label: ([label], 4) for label in _ALL},
}
"""Expert groups by name: modalities and number of experts."""

_DEPTH_EXPERTS = ("1t1i", "4t4i")


def _names() -> tuple[str, ...]:
    return tuple(
        f"moma-{size}-{experts}"
        for size in _SIZES
        for experts in _EXPERTS
        if not size.startswith("mod-") or experts in _DEPTH_EXPERTS
    )


PRESET_NAMES = _names()


def preset_config(name: str) -> ModelConfig:
    """The configuration of a preset.

    Raises:
        ConfigError: no preset has this name; lists those there are.
    """
    if name not in PRESET_NAMES:
        raise ConfigError(f"no preset is called {name!r}; there are {', '.join(PRESET_NAMES)}")
    size, experts = next(
        (size, experts)
        for size in _SIZES
        for experts in _EXPERTS
        if name == f"moma-{size}-{experts}"
    )
    layers, hidden, heads, inner = _SIZES[size]
    groups: list[dict[str, Any]] = [
        {
            "name": group,
            "modalities": modalities,
            "num_experts": num_experts,
            "intermediate_size": inner,
            "aux_hidden_size": hidden // 2,
        }
        for group, (modalities, num_experts) in _EXPERTS[experts].items()
    ]
    depth = {
        "layers": list(range(0, layers, _DEPTH_INTERVAL)),
        "capacity": _DEPTH_CAPACITY,
        "aux_hidden_size": hidden // 2,
    }
    return ModelConfig.from_dict(
        {
            "model_type": "moma",
            "format_version": FORMAT_VERSION,
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
            "norm_order": "post",
            "rms_norm_eps": 1e-5,
            "qk_norm": True,
            "rope_theta": 10000.0,
            "max_position_embeddings": CONTEXT_LENGTH,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "image": _IMAGE,
            "expert_groups": groups,
            "depth_routing": depth if size.startswith("mod-") else None,
        }
    )
