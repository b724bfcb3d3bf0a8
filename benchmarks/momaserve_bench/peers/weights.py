"""Checkpoints of seeded random weights for other engines: written once, then used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from momaserve_bench.peers.shapes import peer_tensors

_SHARD_BYTES = 512 << 20


def write_checkpoint(directory: Path, config: dict[str, Any], seed: int) -> None:
    """Write `config.json` and bfloat16 weights, unless the very same are there.

    Matrices are normal with std 1 / sqrt(columns), as ours are, the embedding with std 1 and norms
    at identity. `config.json` is written last: a directory that has it is whole.
    """
    wanted = json.dumps({**config, "momaserve_seed": seed}, indent=1)
    described = directory / "config.json"
    if described.exists() and described.read_text(encoding="utf-8") == wanted:
        return
    directory.mkdir(parents=True, exist_ok=True)
    described.unlink(missing_ok=True)
    for stale in directory.glob("*.safetensors"):
        stale.unlink()
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, Tensor] = {}
    place: dict[str, str] = {}
    num_shards = total = 0

    def flush() -> None:
        nonlocal num_shards
        name = f"model-{num_shards:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        place.update(dict.fromkeys(shard, name))
        shard.clear()
        num_shards += 1

    for name, shape in peer_tensors(config):
        shard[name] = _random(name, shape, generator)
        total += shard[name].nbytes
        if sum(tensor.nbytes for tensor in shard.values()) >= _SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    described.write_text(wanted, encoding="utf-8")


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    std = 1.0 if name.startswith("model.embed_tokens.") else shape[-1] ** -0.5
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, std, generator=generator)
