"""Exports: complete, in the number format asked for, in shards as the Hub does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from momaserve.errors import CheckpointError, ConfigError
from momaserve.models.config import ModelConfig
from momaserve.models.export import export
from momaserve.models.weights import INDEX_NAME, load_model
from momaserve_server.cli import main
from tests.models.factory import CPU, make_config, run_python, write_checkpoint, write_tensors

SIDE_FILES = {
    "tokenizer.json": "{}",
    "chat_template.jinja": "x",
    "generation_config.json": "{}",
    "README.md": "# card",
    "NOTICES.txt": "notices",
    "training.json": "{}",
    "image_tokenizer/config.json": "{}",
    "image_tokenizer/model.safetensors": "codes",
}
NOT_COPIED = ("run/state.safetensors", "run/log.jsonl", "half.tmp", "other.safetensors", ".hidden")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "mine"
    write_checkpoint(directory, make_config())
    for name in (*SIDE_FILES, *NOT_COPIED):
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SIDE_FILES.get(name, "not for serving"))
    return directory


def files_in(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def load_all(directory: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        if path.name != "other.safetensors":
            tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shard_size", [None, 3000, 1])
def test_an_export_holds_what_the_checkpoint_holds(
    checkpoint: Path, tmp_path: Path, dtype: str, shard_size: int | None
) -> None:
    names = export(checkpoint, tmp_path / "out", dtype=dtype, shard_size=shard_size)
    index = set() if shard_size is None else {INDEX_NAME}
    assert files_in(tmp_path / "out") == {*SIDE_FILES, *names, *index, "config.json"}
    for name, text in SIDE_FILES.items():
        assert (tmp_path / "out" / name).read_text() == text
    wanted, got = load_all(checkpoint), load_all(tmp_path / "out")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        is_threshold = name.endswith(".threshold")
        kind = torch.float32 if is_threshold else getattr(torch, dtype)
        assert torch.equal(got[name], tensor.to(kind)), name
    config = ModelConfig.load(tmp_path / "out")
    assert config == ModelConfig.load(checkpoint)
    model = load_model(tmp_path / "out", config, dtype=torch.float32, device=CPU)
    assert all(router.aux is not None for router in model.routers())


def test_shards_are_as_on_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    names = export(checkpoint, tmp_path / "out", dtype="float32", shard_size=6000)
    count = len(names)
    assert count > 2
    assert names[0] == f"model-00001-of-{count:05d}.safetensors"
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    sizes = {}
    for name in names:
        tensors = load_file(tmp_path / "out" / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == set(tensors)
        sizes[name] = sum(tensor.nbytes for tensor in tensors.values())
        assert sizes[name] <= 6000 or len(tensors) == 1
    assert index["metadata"]["total_size"] == sum(sizes.values())
    # What was read from shards can be written as one file again.
    whole = export(tmp_path / "out", tmp_path / "whole", dtype="float32")
    assert whole == ["model.safetensors"]
    again = load_all(tmp_path / "whole")
    assert all(torch.equal(again[name], t) for name, t in load_all(checkpoint).items())


def test_a_weight_too_large_for_float16_is_named(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "mine", make_config())
    tensors["model.norm.weight"][3] = 1e5
    write_tensors(tmp_path / "mine", tensors)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not finite as float16"):
        export(tmp_path / "mine", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / "config.json").exists()  # half an export is no checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dtype": "int8"}, "dtype must be one of"), ({"shard_size": 0}, "at least 1 byte, got 0")],
)
def test_impossible_settings_are_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(checkpoint, tmp_path / "out", **({"dtype": "float32"} | changes))
    with pytest.raises(ConfigError, match="is not empty"):
        export(checkpoint, checkpoint, dtype="float32")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is not empty"):
        export(checkpoint, tmp_path / "file", dtype="float32")


def test_the_command_and_what_info_reads(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["export", str(checkpoint), "--out", str(out), "--shard-size", "9000"]
    assert main(words) == 0
    assert f"written to {out} as bfloat16: model-00001-of-" in capsys.readouterr().out
    assert main(["info", str(out)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["stored_dtypes"] == ["bfloat16", "float32"]
    assert main(words) == 2
    assert "is not empty" in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    code = (
        "import argparse, sys\n"
        "from momaserve_server import command_export\n"
        "parser = argparse.ArgumentParser()\n"
        "command_export.add_arguments(parser)\n"
        "parser.format_help()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert run_python(code) == 0
