"""Weights that a run begins from instead of random ones: an earlier checkpoint's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from momaserve.errors import CheckpointError, DataError
from momaserve.models.config import ModelConfig, read_json_object
from momaserve.models.moma import MomaModel
from momaserve.models.weights import load_model, weight_files

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Start:
    """A model to go on with, under a fresh optimizer and schedule."""

    model: MomaModel
    """Float32; the run takes it over."""
    origin: Mapping[str, Any]
    """What run.json keeps about it, so that the run is not resumed from another."""


def drop_serving_routers(model: MomaModel) -> None:
    """Auxiliary routers and thresholds are fitted after training, on the frozen model."""
    for router in model.routers():
        router.aux = None
        router.threshold_logits = None


def start_from(checkpoint: Path, config: ModelConfig) -> Start:
    """Begin with a checkpoint's weights, whatever type they are stored in.

    Raises:
        CheckpointError: it cannot be read.
        DataError: it is a model of another shape than `config`; the context may differ.
    """
    check_same(ModelConfig.load(checkpoint), config, checkpoint, ("max_position_embeddings",))
    model = load_model(checkpoint, config, dtype=torch.float32, device=CPU)
    return Start(model, origin_of(checkpoint))


def check_same(
    theirs: ModelConfig, ours: ModelConfig, checkpoint: Path, but: tuple[str, ...]
) -> None:
    """Raises DataError naming the keys of config.json, `but` those, that differ."""
    mine, other = ours.to_dict(), theirs.to_dict()
    differing = sorted(name for name in mine if name not in but and mine[name] != other[name])
    if differing:
        pairs = ", ".join(
            f"{name} {other[name]!r} there, {mine[name]!r} here" for name in differing
        )
        raise DataError(f"{checkpoint} is another model than the recipe's: {pairs}")


def origin_of(checkpoint: Path) -> dict[str, str]:
    """Name and hash of a checkpoint's weights: no path, for run.json travels with the result."""
    digest = hashlib.sha256()
    for path in weight_files(checkpoint):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"checkpoint": checkpoint.resolve().name, "sha256": digest.hexdigest()}


def data_position(checkpoint: Path) -> int | None:
    """Steps of data that the run behind a checkpoint has consumed; None if that is not known."""
    directory = checkpoint / "run"
    try:
        run = read_json_object(directory / "run.json")
        with safe_open(directory / "state.safetensors", framework="pt") as file:
            steps = int(file.get_tensor("step").item())
    except (OSError, SafetensorError, CheckpointError):
        return _recorded_position(checkpoint)
    return steps + int(run.get("skip_steps", 0))


def _recorded_position(checkpoint: Path) -> int | None:
    """The same by training.json, which a checkpoint keeps when its run's folder is gone."""
    if not (checkpoint / "training.json").exists():
        return None
    stage = read_json_object(checkpoint / "training.json").get("pretrain")
    if not isinstance(stage, Mapping) or "training" not in stage:
        return None
    return int(stage["training"]["num_steps"]) + int(stage.get("skip_steps", 0))
