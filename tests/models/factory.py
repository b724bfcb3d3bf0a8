"""Small configurations and checkpoints, and one forward pass over plain token ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.kernels import reference
from momaserve.layers.batch import POLICY_CODES, ForwardBatch, RoutingObserver, RoutingPlan
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.random_weights import random_model
from momaserve.models.weights import stored_tensors

CPU = torch.device("cpu")
IMAGE: dict[str, Any] = {
    "first_token_id": 4,
    "num_codes": 16,
    "tokens_per_image": 4,
    "grid": [2, 2],
    "begin_token_id": 21,
    "end_token_id": 20,
}


def group(name: str, modalities: list[str], experts: int, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "modalities": modalities,
        "num_experts": experts,
        "intermediate_size": 12,
        "aux_hidden_size": 8,
    } | changes


def config_dict(**changes: Any) -> dict[str, Any]:
    """`config.json` of a small depth-routed model: 2 text experts, 1 image expert, GQA."""
    return {
        "model_type": "moma",
        "format_version": 1,
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "norm_order": "post",
        "rms_norm_eps": 1e-5,
        "qk_norm": True,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "image": dict(IMAGE),
        "expert_groups": [group("words", ["text"], 2), group("codes", ["image"], 1)],
        "depth_routing": {"layers": [0, 2], "capacity": 0.25, "aux_hidden_size": 5},
    } | changes


def make_config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(config_dict(**changes))


def make_model(config: ModelConfig, seed: int = 0) -> MomaModel:
    return random_model(config, seed=seed, dtype=torch.float32, device=CPU)


def write_checkpoint(directory: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Writes a random float32 checkpoint in one file; returns its tensors."""
    tensors = stored_tensors(make_model(config), torch.float32)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    write_tensors(directory, tensors)
    return tensors


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), directory / "model.safetensors")


class PlainAttention:
    """Causal attention within rows of equal length; skipped tokens are invisible as keys."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, taken: Tensor | None) -> Tensor:
        rows = [x.view(self._num_rows, -1, *x.shape[1:]) for x in (q, k, v)]
        size = rows[0].shape[1]
        mask = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
        if taken is not None:
            itself = torch.eye(size, dtype=torch.bool)
            mask = (mask & taken.view(self._num_rows, 1, 1, size)) | itself
        return reference.attend(rows[0], rows[1], rows[2], mask).flatten(0, 1)


def forward(
    model: MomaModel,
    token_ids: Tensor,
    policy: RoutingPolicy,
    observer: RoutingObserver | None = None,
) -> Tensor:
    """token_ids [R, S] -> final hidden states [R * S, D]."""
    ids = token_ids.flatten()
    modality = torch.tensor([int(model.config.modality_of(i)) for i in ids.tolist()])
    with torch.no_grad():
        hidden: Tensor = model(
            ForwardBatch(
                token_ids=ids,
                positions=torch.arange(token_ids.shape[1]).repeat(len(token_ids)),
                modality=modality.to(torch.int8),
                modalities=frozenset(Modality),
                routing=RoutingPlan(
                    policies=frozenset({policy}),
                    policy=torch.full_like(modality, POLICY_CODES[policy], dtype=torch.int8),
                    segments=torch.zeros_like(ids),
                    num_segments=1,
                ),
                attention=PlainAttention(len(token_ids)),
                observer=observer,
            )
        )
    return hidden


def run_python(code: str) -> int:
    """Exit status of `code` in a fresh interpreter that finds what this one finds."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode
