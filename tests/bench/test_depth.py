"""`momaserve bench depth`: what it counts and compares, not how long anything takes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from momaserve.layers.block import Block
from momaserve_bench.depth import Pair
from momaserve_bench.depth_options import add_depth
from momaserve_server.cli import main
from tests.reference.checkpoints import CASES, random_checkpoint

QUICK = ["--num-iters", "1", "--roof-gib", "0.001", "--input-len", "5", "--output-len", "3"]


@pytest.fixture(scope="module")
def routed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, two of them with depth routers."""
    directory = tmp_path_factory.mktemp("checkpoints") / "depth"
    directory.mkdir()
    random_checkpoint(directory, seed=1, **CASES["depth_4t4i_post"])
    return directory


def bench(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[str, dict[str, Any]]:
    """What people see, and the line of JSON."""
    assert main(["bench", "depth", *args]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    report: dict[str, Any] = json.loads(line)
    return "\n".join(table), report


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_checkpoint_beside_itself_with_every_layer(
    routed_checkpoint: Path, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--held-len", "16", "--held", "8", "--context-len", "16", "--batch-size", "1", "2"]
    saved = tmp_path / "result.json"
    table, report = bench(
        capsys, str(routed_checkpoint), *QUICK, *sizes, "--block-size", "4",
        "--dtype", "float32", "--backend", backend, "--save-result", str(saved),
    )  # fmt: skip
    assert json.loads(saved.read_text()) == report
    kv = report["kv"]
    config = json.loads((routed_checkpoint / "config.json").read_text())
    num_layers, num_routed = config["num_hidden_layers"], len(config["depth_routing"]["layers"])
    per_layer = 2 * config["num_key_value_heads"] * config["head_dim"] * 4
    # 16 tokens and the sampled one's block are not there yet: four blocks of four.
    assert kv["twin_bytes_per_token"] == per_layer * num_layers
    assert 0 < kv["depth_rate"] < 1
    assert kv["predicted_share"] == pytest.approx(
        1 - num_routed / num_layers * (1 - kv["depth_rate"])
    )
    num_entries = round(kv["depth_rate"] * 16 * num_routed)
    per_block = 4 * (num_layers - num_routed)
    blocks = 4 + -(-num_entries // per_block)
    index = 4 * num_routed * 4  # int32 for each place of a block
    assert kv["bytes_per_token"] == pytest.approx(blocks * (per_block * per_layer + index) / 16)
    assert kv["share"] == kv["bytes_per_token"] / kv["twin_bytes_per_token"]
    room = report["held"]
    assert room["requests"] > room["twin_requests"] >= 8
    kinds = [(one["name"], one["batch_size"]) for one in report["times"]]
    assert kinds == [("decode", 1), ("decode", 2), ("decode, long context", 1), ("prefill", 1)]
    for one in report["times"]:
        assert one["saved"] == pytest.approx(1 - one["seconds"] / one["twin_seconds"])
        assert len(one["all_seconds"][0]) == len(one["all_seconds"][1]) == 1
        predicted = one["predicted_saved"]
        assert 0 < predicted < 1
        if predicted < 0.10:
            assert one["realised"] is None
        else:
            assert one["realised"] == pytest.approx(one["saved"] / predicted)
    assert "requests of 32 tokens held" in table


def test_a_model_without_depth_routing(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "depth", str(small_checkpoint), *QUICK]) == 2
    assert "4t4i has no depth routing: there is nothing to compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--held", "0"], "--held must be at least 1, got 0"),
        (["--output-len", "1"], "--output-len must be at least 2, got 1"),
        (["--batch-size", "2", "0"], "--batch-size must be at least 1, got 0"),
        (["--roof-gib", "0"], "--roof-gib must be above 0, got 0.0"),
    ],
)
def test_numbers_out_of_range(
    routed_checkpoint: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "depth", str(routed_checkpoint), *QUICK, *args]) == 2
    assert message in capsys.readouterr().err


def test_the_twin_has_the_same_weights(routed_checkpoint: Path) -> None:
    parser = argparse.ArgumentParser()
    add_depth(parser.add_subparsers())
    args = parser.parse_args(["depth", str(routed_checkpoint), "--backend", "reference"])
    pair = Pair.load(args)
    assert pair.plain.model_config.depth_routing is None
    assert pair.plain.kv_cache_bytes < pair.routed.kv_cache_bytes  # by the index
    for one, other in zip(pair.routed.model.blocks, pair.plain.model.blocks, strict=True):
        assert isinstance(one, Block)
        assert isinstance(other, Block)
        assert torch.equal(one.self_attn.q_proj.weight, other.self_attn.q_proj.weight)
        assert other.depth_router is None
