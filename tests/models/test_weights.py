"""Checkpoint files: every tensor is used exactly once, or the load fails and names it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from momaserve.config import RoutingPolicy
from momaserve.errors import CheckpointError
from momaserve.layers.routing import Router
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.weights import (
    load_model,
    read_headers,
    save_config,
    stored_tensors,
    tensor_specs,
)
from tests.models.factory import (
    CPU,
    config_dict,
    forward,
    group,
    make_config,
    make_model,
    write_checkpoint,
    write_tensors,
)

ROUTER = "model.layers.0.experts.words.router.weight"
THRESHOLD = "model.layers.0.experts.words.router.threshold"
DEPTH_THRESHOLD = "model.layers.2.depth_router.threshold"
AUX = "model.layers.0.experts.words.aux_router.fc2.weight"
NORM = "model.layers.1.ffn_norm.weight"
DOWN = "model.layers.1.experts.codes.down_proj"


def load(directory: Path, dtype: torch.dtype = torch.float32) -> MomaModel:
    return load_model(directory, ModelConfig.load(directory), dtype=dtype, device=CPU)


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(directory)
    return str(caught.value)


def is_optional(name: str) -> bool:
    return tensor_specs(make_config())[name].is_optional


def test_names_and_shapes_are_those_of_the_contract() -> None:
    shapes = {name: spec.shape for name, spec in tensor_specs(make_config()).items()}
    layer = {
        "self_attn.q_proj.weight": (24, 16),
        "self_attn.k_proj.weight": (12, 16),
        "self_attn.v_proj.weight": (12, 16),
        "self_attn.o_proj.weight": (16, 24),
        "self_attn.q_norm.weight": (4, 6),
        "self_attn.q_norm.bias": (4, 6),
        "self_attn.k_norm.weight": (2, 6),
        "self_attn.k_norm.bias": (2, 6),
        "attn_norm.weight": (16,),
        "ffn_norm.weight": (16,),
        "experts.words.gate_proj": (2, 12, 16),
        "experts.words.up_proj": (2, 12, 16),
        "experts.words.down_proj": (2, 16, 12),
        "experts.words.router.weight": (2, 16),
        "experts.words.router.threshold": (2,),
        "experts.words.aux_router.fc1.weight": (8, 16),
        "experts.words.aux_router.fc2.weight": (2, 8),
        "experts.codes.gate_proj": (1, 12, 16),
        "experts.codes.up_proj": (1, 12, 16),
        "experts.codes.down_proj": (1, 16, 12),
    }
    depth = {
        "depth_router.weight": (1, 16),
        "depth_router.threshold": (1,),
        "depth_router.aux.fc1.weight": (5, 16),
        "depth_router.aux.fc2.weight": (1, 5),
    }
    wanted = {
        "model.embed_tokens.weight": (40, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (40, 16),
    }
    for index, parts in enumerate([layer | depth, layer, layer | depth]):
        wanted |= {f"model.layers.{index}.{name}": shape for name, shape in parts.items()}
    assert shapes == wanted


def test_every_parameter_has_a_tensor() -> None:
    config = make_config()
    targets = [spec.target for spec in tensor_specs(config).values()]
    assert len(set(targets)) == len(targets)
    assert set(targets) == set(make_model(config).state_dict())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "depth_routing": None}])
def test_saved_then_loaded_is_equal(tmp_path: Path, changes: dict[str, object]) -> None:
    config = make_config(**changes)
    written = write_checkpoint(tmp_path, config)
    save_config(config, tmp_path)
    model = load(tmp_path)

    assert not model.training
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())
    again = stored_tensors(model, torch.float32)
    assert again.keys() == written.keys()
    for name, tensor in written.items():
        assert_close(again[name], tensor, rtol=0, atol=1e-7 if "threshold" in name else 0)
    ids = torch.randint(config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(3))
    for policy in RoutingPolicy:
        assert_close(
            forward(model, ids, policy), forward(make_model(config), ids, policy), rtol=0, atol=0
        )


def test_routers_stay_float32_in_a_narrow_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, make_config())
    model = load(tmp_path, torch.bfloat16)
    routers = {id(p) for router in model.routers() for p in router.parameters()}
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if id(parameter) in routers else torch.bfloat16
        assert parameter.dtype == wanted, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_files_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    config = make_config()
    written = write_checkpoint(tmp_path, config)
    narrow = stored_tensors(make_model(config), dtype)
    write_tensors(tmp_path, narrow)

    assert {name for name, t in narrow.items() if t.dtype == torch.float32} == {
        name for name in narrow if name.endswith(".threshold")
    }
    assert_close(
        load(tmp_path).embed_tokens.data, written["model.embed_tokens.weight"].to(dtype).float()
    )
    headers = read_headers(tmp_path, config)
    assert headers[NORM] == ((16,), {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype])


def test_thresholds_are_stored_as_probabilities(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, make_config())
    tensors[THRESHOLD] = torch.tensor([0.2, 0.75])
    tensors[DEPTH_THRESHOLD] = torch.tensor([0.0])
    write_tensors(tmp_path, tensors)

    model = load(tmp_path)

    logits = model.get_submodule("blocks.0.experts.groups.0.router").threshold_logits
    assert isinstance(logits, Tensor)
    assert_close(logits, torch.tensor([math.log(0.25), math.log(3.0)]))
    router = model.get_submodule("blocks.2.depth_router.router")
    assert isinstance(router, Router)
    assert router.threshold_logits is not None
    assert router.threshold_logits.tolist() == [-math.inf]  # every affinity is above 0
    assert_close(stored_tensors(model, torch.float32)[THRESHOLD], torch.tensor([0.2, 0.75]))


def without_aux(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if "aux" in n]:
        del tensors[name]


def without_thresholds(tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if n.endswith(".threshold")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (without_aux, (RoutingPolicy.CAUSAL, "auxiliary routers")),
        (without_thresholds, (RoutingPolicy.CALIBRATED, "thresholds")),
    ],
)
def test_optional_tensors_may_be_absent_together(
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    missing: tuple[RoutingPolicy, str],
) -> None:
    tensors = write_checkpoint(tmp_path, make_config())
    change(tensors)
    write_tensors(tmp_path, tensors)

    model = load(tmp_path)

    refused, word = missing
    for policy in RoutingPolicy:
        reason = model.missing_for(policy)
        if policy is refused:
            assert reason is not None
            assert word in reason
            assert "momaserve fit-routers" in reason
        else:
            assert reason is None
    assert stored_tensors(model, torch.float32).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("name", "policy"),
    [(THRESHOLD, RoutingPolicy.CALIBRATED), (DEPTH_THRESHOLD, RoutingPolicy.CALIBRATED)],
)
def test_one_router_without_threshold_rules_the_policy_out(
    tmp_path: Path, name: str, policy: RoutingPolicy
) -> None:
    tensors = write_checkpoint(tmp_path, make_config())
    del tensors[name]
    write_tensors(tmp_path, tensors)
    model = load(tmp_path)
    assert model.missing_for(policy) is not None
    assert model.missing_for(RoutingPolicy.CAUSAL) is None


def test_saturated_thresholds_survive_saving(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, make_config())
    model = load(tmp_path)
    router = model.routers()[0]
    assert router.threshold_logits is not None
    router.threshold_logits.fill_(30.0)
    assert all(
        bool((t < 1).all())
        for n, t in stored_tensors(model, torch.float32).items()
        if n.endswith(".threshold")
    )


@pytest.mark.parametrize("name", [AUX, "model.layers.2.depth_router.aux.fc1.weight"])
def test_half_an_auxiliary_router_is_refused(tmp_path: Path, name: str) -> None:
    tensors = write_checkpoint(tmp_path, make_config())
    assert is_optional(name)
    del tensors[name]
    write_tensors(tmp_path, tensors)
    assert f"missing tensors: {name}" in refusal(tmp_path)


def test_missing_unknown_misshaped_and_mistyped_are_all_named(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, make_config())
    del tensors[ROUTER]
    tensors["model.layers.0.experts.words.router.bias"] = torch.zeros(2)
    tensors[DOWN] = torch.zeros(1, 12, 16)
    tensors[NORM] = torch.ones(16, dtype=torch.float64)
    write_tensors(tmp_path, tensors)

    message = refusal(tmp_path)

    assert str(tmp_path) in message
    assert f"missing tensors: {ROUTER};" in message
    assert "unknown tensors: model.layers.0.experts.words.router.bias;" in message
    assert f"wrong shapes: {DOWN} is [1, 12, 16], config.json wants [1, 16, 12];" in message
    assert f"{NORM} is F64" in message


def test_at_most_ten_names_a_side_are_listed(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, make_config())
    renamed = {f"x{index}": tensor for index, tensor in enumerate(tensors.values())}
    write_tensors(tmp_path, renamed)

    message = refusal(tmp_path)

    required = sum(not is_optional(name) for name in tensors)
    assert f" and {required - 10} more; unknown tensors: " in message
    assert message.endswith(f" and {len(tensors) - 10} more")
    assert len(re.findall(r"\bx\d+", message)) == 10


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [NORM, THRESHOLD])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, name: str, value: float) -> None:
    tensors = write_checkpoint(tmp_path, make_config())
    tensors[name][-1] = value
    write_tensors(tmp_path, tensors)
    assert f"tensor {name} holds NaN or infinite values" in refusal(tmp_path)


def test_values_too_large_for_the_wanted_dtype_are_refused(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, make_config())
    tensors[NORM][0] = 1e6
    write_tensors(tmp_path, tensors)
    load(tmp_path)
    with pytest.raises(
        CheckpointError, match=f"{NORM} holds NaN or infinite values as torch.float16"
    ):
        load(tmp_path, torch.float16)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_files_are_refused(tmp_path: Path, kept: int) -> None:
    write_checkpoint(tmp_path, make_config())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is truncated or not a safetensors file" in refusal(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    save_config(make_config(), tmp_path)
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(tmp_path)


def test_tied_models_have_no_head(tmp_path: Path) -> None:
    config = make_config(tie_word_embeddings=True)
    tensors = write_checkpoint(tmp_path, config)
    assert "lm_head.weight" not in tensors
    model = load(tmp_path)
    hidden = torch.ones(1, 16)
    assert_close(model.logits(hidden), hidden @ tensors["model.embed_tokens.weight"].T)

    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(tmp_path, tensors)
    assert "unknown tensors: lm_head.weight" in refusal(tmp_path)


def test_a_single_expert_has_no_router(tmp_path: Path) -> None:
    names = tensor_specs(
        make_config(expert_groups=[group("all", ["text", "image"], 1)], depth_routing=None)
    )
    assert not [name for name in names if "router" in name]
    tensors = write_checkpoint(tmp_path, make_config())
    name = "model.layers.0.experts.codes.router.weight"
    write_tensors(tmp_path, tensors | {name: torch.zeros(1, 16)})
    assert f"unknown tensors: {name}" in refusal(tmp_path)


class Shards:
    """A checkpoint cut into two files with an index."""

    def __init__(self, directory: Path) -> None:
        tensors = write_checkpoint(directory, make_config())
        (directory / "model.safetensors").unlink()
        names = sorted(tensors)
        self.directory = directory
        self.tensors = tensors
        self.files = {
            "model-00001-of-00002.safetensors": names[::2],
            "model-00002-of-00002.safetensors": names[1::2],
        }

    def write(self, index: object = None) -> None:
        for file, names in self.files.items():
            save_file({name: self.tensors[name].clone() for name in names}, self.directory / file)
        weight_map = {name: file for file, names in self.files.items() for name in names}
        self.index = {"metadata": {}, "weight_map": weight_map} if index is None else index
        path = self.directory / "model.safetensors.index.json"
        path.write_text(json.dumps(self.index), encoding="utf-8")


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    shards.write()
    (tmp_path / "other.safetensors").write_bytes(b"not named by the index, not read")
    again = stored_tensors(load(tmp_path), torch.float32)
    for name, tensor in shards.tensors.items():
        assert_close(again[name], tensor, rtol=0, atol=1e-7 if "threshold" in name else 0)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    for names in shards.files.values():
        if NORM not in names:
            names.append(NORM)
    shards.write()
    assert f"tensor {NORM} is in two files" in refusal(tmp_path)


@pytest.mark.parametrize("change", ["moved", "dropped"])
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path, change: str) -> None:
    shards = Shards(tmp_path)
    first, second = shards.files
    weight_map = {name: file for file, names in shards.files.items() for name in names}
    if change == "dropped":
        del weight_map[NORM]
    else:
        weight_map[NORM] = second if weight_map[NORM] == first else first
    shards.write({"weight_map": weight_map})
    assert f"and the shards disagree about tensors: {NORM}" in refusal(tmp_path)


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    shards = Shards(tmp_path)
    shards.write()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert refusal(tmp_path).endswith("model-00002-of-00002.safetensors does not exist")


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "config.json",
        "pytorch_model.bin",
    ],
)
def test_an_index_names_files_beside_itself(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "checkpoint"
    shards = Shards(directory)
    save_file({NORM: torch.ones(16)}, tmp_path / "elsewhere.safetensors")
    shards.write({"weight_map": {NORM: name}})
    assert f"must name safetensors files beside itself, not {name!r}" in refusal(directory)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"metadata": {}}, "has no weight_map"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["model.safetensors"]}, "has no weight_map"),
        ([], "must hold a JSON object"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, index: object, message: str) -> None:
    Shards(tmp_path).write(index)
    assert message in refusal(tmp_path)


def test_config_is_replaced_whole(tmp_path: Path) -> None:
    save_config(make_config(), tmp_path / "new")
    assert ModelConfig.load(tmp_path / "new") == ModelConfig.from_dict(config_dict())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]
