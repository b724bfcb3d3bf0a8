"""Shapes of other engines: the same dimensions, and nearly the same number of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from momaserve.errors import ConfigError
from momaserve.models.info import describe
from momaserve.models.presets import preset_config
from momaserve_bench.peers.arguments import PAIRS
from momaserve_bench.peers.shapes import num_parameters, peer_config, peer_tensors
from momaserve_bench.peers.weights import write_checkpoint
from tests.models.factory import group, make_config

_SMALL = make_config(depth_routing=None)


@pytest.mark.parametrize("preset", PAIRS.values())
def test_parameters_agree_within_one_percent(preset: str) -> None:
    config = preset_config(preset)
    ours = describe(config).num_parameters
    assert abs(num_parameters(peer_config(config)) - ours) <= 0.01 * ours


def test_a_dense_shape_is_a_llama() -> None:
    config = peer_config(preset_config("moma-435m-dense"))
    assert config["model_type"] == "llama"
    assert (config["hidden_size"], config["num_hidden_layers"]) == (1024, 24)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (16, 16)
    assert (config["head_dim"], config["intermediate_size"]) == (64, 2730)
    assert config["vocab_size"] == 65536
    assert "num_local_experts" not in config
    # Counted by hand: embedding and head, and per layer attention, SwiGLU and two norms.
    layer = 4 * 1024 * 1024 + 3 * 1024 * 2730 + 2 * 1024
    assert num_parameters(config) == 2 * 65536 * 1024 + 24 * layer + 1024


@pytest.mark.parametrize("preset", ["moma-435m-moe-8x", "moma-435m-4t4i"])
def test_experts_make_a_mixtral_with_one_expert_per_token(preset: str) -> None:
    config = peer_config(preset_config(preset))
    assert config["model_type"] == "mixtral"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 1)
    layer = 4 * 1024 * 1024 + 8 * 3 * 1024 * 2730 + 8 * 1024 + 2 * 1024
    assert num_parameters(config) == 2 * 65536 * 1024 + 24 * layer + 1024


def test_what_no_other_engine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="depth routing"):
        peer_config(make_config())
    groups = [group("w", ["text"], 2), group("c", ["image"], 2, intermediate_size=16)]
    with pytest.raises(ConfigError, match=r"one size, got \[12, 16\]"):
        peer_config(make_config(depth_routing=None, expert_groups=groups))


def test_tied_embeddings_have_no_head() -> None:
    names = [name for name, _ in peer_tensors({**peer_config(_SMALL), "tie_word_embeddings": True})]
    assert "lm_head.weight" not in names
    assert len(set(names)) == len(names)


def test_a_checkpoint_has_every_tensor_and_is_written_once(tmp_path: Path) -> None:
    config = peer_config(_SMALL)
    write_checkpoint(tmp_path, config, seed=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    tensors = {
        name: tensor
        for file in set(index["weight_map"].values())
        for name, tensor in load_file(tmp_path / file).items()
    }
    assert {name: tuple(t.shape) for name, t in tensors.items()} == dict(peer_tensors(config))
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == 2 * num_parameters(config)
    assert bool((tensors["model.norm.weight"] == 1).all())

    shard = tmp_path / "model-00000.safetensors"
    before = shard.stat().st_mtime_ns
    write_checkpoint(tmp_path, config, seed=3)
    assert shard.stat().st_mtime_ns == before
    write_checkpoint(tmp_path, config, seed=4)
    again = load_file(shard)["lm_head.weight"]
    assert not torch.equal(again, tensors["lm_head.weight"])


def test_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    config = peer_config(_SMALL)
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, config, seed=5)
    one, other = ((tmp_path / n / "model-00000.safetensors").read_bytes() for n in ("a", "b"))
    assert one == other
