"""Writes a checkpoint anew: another number format, shards with an index as on the Hub.

Reads one tensor at a time and keeps one shard in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from momaserve.errors import CheckpointError, ConfigError
from momaserve.models.config import ModelConfig
from momaserve.models.weights import (
    INDEX_NAME,
    STORED_DTYPES,
    WEIGHTS_NAME,
    read_headers,
    read_tensors,
    save_config,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_IMAGE_TOKENIZER = ("config.json", WEIGHTS_NAME)
_NOT_COPIED = (".safetensors", ".tmp")


def export(checkpoint: Path, out: Path, *, dtype: str, shard_size: int | None = None) -> list[str]:
    """Write a complete serving directory; config.json comes last, so half of one is none.

    Args:
        dtype: one of DTYPES, of all tensors but thresholds, which are float32 always.
        shard_size: bytes of tensors that a file may hold, if it holds more than one; None puts
            all into one file.

    Returns:
        Names of the files of weights.

    Raises:
        CheckpointError: the checkpoint is broken, or a weight is too large for `dtype`.
        ConfigError: `out` is not empty, or a setting that cannot work.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if shard_size is not None and shard_size < 1:
        raise ConfigError(f"the shard size must be at least 1 byte, got {shard_size}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty: an export goes into a folder of its own")
    config = ModelConfig.load(checkpoint)
    shapes = {name: shape for name, (shape, _) in read_headers(checkpoint, config).items()}
    wanted = {name: _stored_dtype(name, dtype) for name in shapes}
    sizes = {name: prod(shapes[name]) * wanted[name].itemsize for name in shapes}
    files = _files(sizes, shard_size)
    out.mkdir(parents=True, exist_ok=True)
    for file, names in files.items():
        tensors: dict[str, Tensor] = {}
        for name, tensor in read_tensors(checkpoint, names):
            tensors[name] = tensor.to(wanted[name])
            if not bool(tensors[name].isfinite().all()):
                raise CheckpointError(f"tensor {name} is not finite as {dtype}")
        save_file(tensors, out / file, metadata={"format": "pt"})
        (out / file).chmod(0o644)  # safetensors makes private files
    if shard_size is not None:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _copy_side_files(checkpoint, out)
    save_config(config, out)
    return list(files)


def _stored_dtype(name: str, dtype: str) -> torch.dtype:
    return STORED_DTYPES["F32"] if name.endswith(".threshold") else DTYPES[dtype]


def _files(sizes: Mapping[str, int], shard_size: int | None) -> dict[str, list[str]]:
    """Names of tensors by file, filled in order."""
    if shard_size is None:
        return {WEIGHTS_NAME: list(sizes)}
    shards: list[list[str]] = [[]]
    room = shard_size
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= size
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def _copy_side_files(checkpoint: Path, out: Path) -> None:
    """Everything beside the weights but runs: tokenizers, template, defaults, card, notices."""
    for path in sorted(checkpoint.iterdir()):
        is_ours = path.name in ("config.json", INDEX_NAME) or path.suffix in _NOT_COPIED
        if path.is_file() and not is_ours and not path.name.startswith("."):
            shutil.copyfile(path, out / path.name)
    if (checkpoint / "image_tokenizer").is_dir():
        (out / "image_tokenizer").mkdir()
        for name in _IMAGE_TOKENIZER:
            shutil.copyfile(checkpoint / "image_tokenizer" / name, out / "image_tokenizer" / name)
