"""`describe` and `momaserve info` against arithmetic done by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from momaserve.errors import CheckpointError, ConfigError
from momaserve.modality import Modality
from momaserve.models.info import (
    ModelInfo,
    TokenCost,
    describe,
    describe_checkpoint,
    forward_flops,
)
from momaserve.models.presets import PRESET_NAMES, preset_config
from momaserve.models.weights import save_config, stored_tensors
from momaserve_server import command_info
from tests.models.factory import (
    config_dict,
    group,
    make_config,
    make_model,
    run_python,
    write_checkpoint,
    write_tensors,
)

# The small configuration: V 40, D 16, L 3, H 4, G 2, K 6, F 12; 2 text experts with A 8, one
# image expert; layers 0 and 2 have a depth router with A 5 and take a quarter of the tokens.
EMBEDDING = 40 * 16
ATTENTION = 16 * 24 + 2 * 16 * 12 + 24 * 16  # q, k and v, o
NORMS = 2 * 16 + 2 * 24 + 2 * 12  # block norms; weight and bias of the q and of the k norm
EXPERT = 3 * 16 * 12
ROUTER = 2 * 16
AUX_ROUTER = 8 * 16 + 2 * 8
DEPTH_ROUTER = 16
AUX_DEPTH_ROUTER = 5 * 16 + 5
SHARES = 0.25 + 1 + 0.25
PARTS = {
    "embedding": EMBEDDING,
    "head": EMBEDDING,
    "attention": 3 * ATTENTION,
    "norms": 3 * NORMS + 16,
    "experts (words)": 3 * 2 * EXPERT,
    "experts (codes)": 3 * EXPERT,
    "routers": 3 * ROUTER,
    "depth routers": 2 * DEPTH_ROUTER,
    "auxiliary routers": 3 * AUX_ROUTER + 2 * AUX_DEPTH_ROUTER,
    "router thresholds": 3 * 2 + 2,
}


def parts(info: ModelInfo) -> dict[str, int]:
    return {part.name: part.parameters for part in info.parts}


def cost(info: ModelInfo, modality: str) -> TokenCost:
    return next(cost for cost in info.costs if cost.modality == modality)


def test_parameters_by_part() -> None:
    info = describe(make_config())
    assert list(parts(info).items()) == list(PARTS.items())
    assert info.num_stored_parameters == sum(PARTS.values()) == 10986
    assert info.num_parameters == 10986 - (3 * 144 + 2 * 85) - 8


def test_bytes_follow_the_dtype_but_thresholds_are_float32() -> None:
    narrow, wide = describe(make_config()), describe(make_config(), dtype="float32")
    assert narrow.stored_bytes == 2 * (10986 - 8) + 4 * 8
    assert wide.stored_bytes == 4 * 10986
    assert narrow.stored_dtypes == ("bfloat16", "float32")
    assert (narrow.compute_dtype, wide.compute_dtype) == ("bfloat16", "float32")
    assert narrow.kv_bytes_per_token == 3 * 2 * 12 * 2
    assert wide.kv_bytes_per_token == 3 * 2 * 12 * 4


def test_cost_of_a_token_by_modality() -> None:
    info = describe(make_config())
    depth = 2 * (DEPTH_ROUTER + AUX_DEPTH_ROUTER)
    words = ATTENTION + EXPERT + ROUTER + AUX_ROUTER
    codes = ATTENTION + EXPERT
    attention_flops = 4 * 24 * 64 * (0.25 * 0.25 + 1 + 0.25 * 0.25)

    assert info.context == 64
    assert [cost.modality for cost in info.costs] == ["text", "image"]
    text, image = info.costs
    assert text.linear_flops == 2 * (EMBEDDING + depth + SHARES * words) == 7396
    assert image.linear_flops == 2 * (EMBEDDING + depth + SHARES * codes) == 6868
    assert text.attention_flops == image.attention_flops == attention_flops == 6912
    assert text.flops == 7396 + 6912
    assert text.active_parameters == EMBEDDING + 32 + depth + SHARES * (words + NORMS) == 3886
    assert image.active_parameters == EMBEDDING + 32 + depth + SHARES * (codes + NORMS) == 3622
    assert text.kv_bytes == image.kv_bytes == SHARES * 2 * 12 * 2


def test_depth_routing_may_spare_a_modality() -> None:
    depth = {"layers": [0, 2], "capacity": 0.25, "aux_hidden_size": 5, "modalities": ["image"]}
    info = describe(make_config(depth_routing=depth), context=10)
    text = cost(info, "text")
    assert text.linear_flops == 2 * (EMBEDDING + 3 * (ATTENTION + EXPERT + ROUTER + AUX_ROUTER))
    assert text.attention_flops == 4 * 24 * 10 * 3
    assert text.kv_bytes == info.kv_bytes_per_token
    assert cost(info, "image").linear_flops == 6868


def test_a_tied_dense_text_model() -> None:
    groups = config_dict()["expert_groups"][1:]
    groups[0]["modalities"] = ["text", "image"]
    config = make_config(
        expert_groups=groups,
        depth_routing=None,
        image=None,
        tie_word_embeddings=True,
        qk_norm=False,
    )
    info = describe(config, dtype="float16")
    assert parts(info) == {
        "embedding": EMBEDDING,
        "attention": 3 * ATTENTION,
        "norms": 3 * 32 + 16,
        "experts (codes)": 3 * EXPERT,
    }
    assert info.num_parameters == info.num_stored_parameters
    assert [cost.modality for cost in info.costs] == ["text"]
    assert info.costs[0].linear_flops == 2 * (EMBEDDING + 3 * (ATTENTION + EXPERT))
    assert info.costs[0].active_parameters == EMBEDDING + 32 + 3 * (ATTENTION + EXPERT + 32)


def test_the_flops_of_a_forward_pass() -> None:
    """Layers 0 and 2 take a quarter of the tokens, with a quarter of the others in sight."""
    config = make_config()
    tokens = {Modality.TEXT: 10, Modality.IMAGE: 6}
    visible = {Modality.TEXT: 40, Modality.IMAGE: 33}
    linear = 16 * (SHARES * (ATTENTION + EXPERT) + 2 * DEPTH_ROUTER) + 10 * SHARES * ROUTER
    attention = 2 * 24 * (40 + 33) * (1 + 2 * 0.25**2)
    got = forward_flops(config, num_tokens=tokens, num_visible=visible, num_logits=7)
    assert got == 2 * (linear + attention + 7 * EMBEDDING)
    only_text = {Modality.TEXT: 10, Modality.IMAGE: 0}
    dense = make_config(image=None, depth_routing=None, expert_groups=[group("all", ["text"], 1)])
    got = forward_flops(dense, num_tokens=only_text, num_visible=visible, num_logits=0)
    assert got == 2 * (10 * 3 * (ATTENTION + EXPERT) + 3 * 2 * 24 * 40)


def test_checkpoints_are_described_by_what_they_hold(tmp_path: Path) -> None:
    config = make_config()
    tensors = stored_tensors(make_model(config), torch.float16)
    tensors = {name: tensor for name, tensor in tensors.items() if "aux" not in name}
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    write_tensors(tmp_path, tensors)

    info = describe_checkpoint(tmp_path, config)

    assert "auxiliary routers" not in parts(info)
    assert info.num_stored_parameters == info.num_parameters + 8
    assert info.stored_bytes == sum(t.numel() * t.itemsize for t in tensors.values())
    assert info.stored_dtypes == ("float16", "float32")
    assert info.compute_dtype == "float16"
    text = 2 * (EMBEDDING + 2 * DEPTH_ROUTER + SHARES * (ATTENTION + EXPERT + ROUTER))
    assert cost(info, "text").linear_flops == text


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_presets_are_flop_matched(name: str) -> None:
    # The rows of the paper's Table 1 cost the same per token; causal routers add their share.
    # Depth-routed shapes are compared with the dense one of their row.
    rows = {"110m": "90m", "635m": "435m", "2.3b": "1.4b"}
    size = name.removeprefix("moma-").removeprefix("mod-").split("-")[0]
    dense = describe(preset_config(f"moma-{rows.get(size, size)}-dense"))
    info = describe(preset_config(name))
    assert info.costs[0].flops == info.costs[1].flops
    assert info.costs[0].flops / dense.costs[0].flops == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("context", [0, 65])
def test_impossible_contexts_are_refused(context: int) -> None:
    with pytest.raises(ConfigError, match=f"between 1 and 64 tokens, got {context}"):
        describe(make_config(), context=context)


def test_unknown_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dtype must be one of float32, .* got 'int8'"):
        describe(make_config(), dtype="int8")


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command_info.add_arguments(parser)
    return command_info.run(parser.parse_args(list(words)))


def test_command_describes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    write_checkpoint(tmp_path, config)

    assert run(str(tmp_path), "--context", "8") == 0

    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["model"] == str(tmp_path)
    assert report["config"] == config.to_dict()
    assert report["num_stored_parameters"] == 10986
    assert report["stored_dtypes"] == ["float32"]
    assert report["context"] == 8
    assert report["costs"][0]["flops"] == 7396 + 6912 // 8
    assert {part["name"]: part["parameters"] for part in report["parts"]} == PARTS
    assert report["versions"]["torch"] == torch.__version__
    rows = {line[:22].strip(): line.split()[-2:] for line in table}
    assert rows["experts (words)"] == ["3,456", f"{3456 * 4:,}"]
    assert rows["all"] == ["10,986", f"{10986 * 4:,}"]


def test_command_describes_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    name = "moma-mod-2.3b-4t4i"
    assert run("--preset", name, "--random-weights", "--dtype", "float16") == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert report["model"] == name
    assert report["num_parameters"] == describe(preset_config(name)).num_parameters
    assert report["compute_dtype"] == "float16"
    assert "depth routing: 16 layers, capacity 0.25" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "gpt-2"], "no preset is called 'gpt-2'; there are moma-90m-dense"),
        (["somewhere", "--preset", "moma-90m-4t4i"], "CHECKPOINT somewhere or --preset, not both"),
        (["somewhere", "--random-weights"], "go with --preset"),
        (["somewhere", "--dtype", "float32"], "go with --preset"),
    ],
)
def test_command_refuses_bad_usage(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*words)


def test_command_names_a_broken_checkpoint(tmp_path: Path) -> None:
    save_config(make_config(), tmp_path)
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors"):
        run(str(tmp_path))


def test_help_imports_no_torch() -> None:
    code = (
        "import argparse, sys\n"
        "from momaserve_server import command_info\n"
        "parser = argparse.ArgumentParser()\n"
        "command_info.add_arguments(parser)\n"
        "parser.format_help()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert run_python(code) == 0
