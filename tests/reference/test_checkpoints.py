"""The random checkpoints are those of the contract, and their routers decide as they claim."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import save_file

from tests.reference import moma_float64 as moma
from tests.reference.checkpoints import (
    CASES,
    DEPTH,
    expert_group,
    random_checkpoint,
    sample_ids,
)

TWO = [expert_group("all", "text image", 2, 12)]


def written(directory: Path, case: str, **more: Any) -> tuple[moma.Config, moma.Weights]:
    random_checkpoint(directory, seed=1, **CASES[case], **more)
    return moma.load_checkpoint(directory)


@pytest.mark.parametrize("case", CASES)
def test_cases_decide_variedly_and_clearly(tmp_path: Path, case: str) -> None:
    config, weights = written(tmp_path, case)
    ids = sample_ids(config, 3)
    logits = {}
    for policy in moma.POLICIES:
        trace: list[moma.Decision] = []
        logits[policy] = moma.forward(config, weights, ids, policy, trace=trace)
        assert logits[policy].shape == (len(ids), 64)
        assert 1.0 < logits[policy].std() < 4.0
        assert min((decision.margin for decision in trace), default=1.0) > 1e-4
        counts = [d.selected.sum(axis=1) for d in trace if ".experts." in d.router]
        if counts and policy != "threshold":
            per_token = np.concatenate(counts)
            assert 0.5 < per_token.mean() < 2.0
            assert {0, 1, 2} <= set(per_token.tolist())
        for decision in trace:
            if "depth" in decision.router:
                assert 0.05 < decision.selected.mean() < 0.95
    routed = any("router" in name for name in weights)
    assert (abs(logits["causal"] - logits["expert_choice"]).max() > 0.01) == routed


def test_tensors_are_those_of_the_contract(tmp_path: Path) -> None:
    config, weights = written(tmp_path, "depth_text_only_pre", heads=6, kv_heads=2)
    layer = {
        "self_attn.q_proj.weight": (48, 32),
        "self_attn.k_proj.weight": (16, 32),
        "self_attn.v_proj.weight": (16, 32),
        "self_attn.o_proj.weight": (32, 48),
        "self_attn.q_norm.weight": (6, 8),
        "self_attn.q_norm.bias": (6, 8),
        "self_attn.k_norm.weight": (2, 8),
        "self_attn.k_norm.bias": (2, 8),
        "attn_norm.weight": (32,),
        "ffn_norm.weight": (32,),
        "experts.words.gate_proj": (3, 45, 32),
        "experts.words.up_proj": (3, 45, 32),
        "experts.words.down_proj": (3, 32, 45),
        "experts.words.router.weight": (3, 32),
        "experts.words.router.threshold": (3,),
        "experts.words.aux_router.fc1.weight": (20, 32),
        "experts.words.aux_router.fc2.weight": (3, 20),
        "experts.codes.gate_proj": (1, 70, 32),
        "experts.codes.up_proj": (1, 70, 32),
        "experts.codes.down_proj": (1, 32, 70),
    }
    depth = {
        "depth_router.weight": (1, 32),
        "depth_router.threshold": (1,),
        "depth_router.aux.fc1.weight": (16, 32),
        "depth_router.aux.fc2.weight": (1, 16),
    }
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (64, 32),
    }
    for i in range(4):
        parts = layer | depth if i in DEPTH["layers"] else layer
        expected |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    assert {name: weight.shape for name, weight in weights.items()} == expected
    assert config == json.loads((tmp_path / "config.json").read_text())


def test_seed_decides_everything(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "a", seed=5, groups=TWO)
    random_checkpoint(tmp_path / "b", seed=5, groups=TWO)
    random_checkpoint(tmp_path / "c", seed=6, groups=TWO)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_shards_and_half_precision_load_exactly(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_torch = pytest.importorskip("safetensors.torch").save_file
    values = np.array([[1.0, -0.5], [3.140625, 2.0**-30]])  # exact in bf16
    save_torch({"a": torch.tensor(values, dtype=torch.bfloat16)}, tmp_path / "1.safetensors")
    halves = np.array([0.333251953125, -65504.0], dtype=np.float16)
    save_file({"b": halves}, tmp_path / "2.safetensors", metadata={"format": "np"})
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    _, weights = moma.load_checkpoint(tmp_path)
    assert_array_equal(weights["a"], values)
    assert_array_equal(weights["b"], halves.astype(np.float64))
    assert weights["a"].dtype == weights["b"].dtype == np.float64
