"""From a checkpoint directory, or a preset's name, to everything that an engine is built on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from momaserve.config import EngineConfig
from momaserve.errors import CheckpointError, ConfigError
from momaserve.models.config import ModelConfig
from momaserve.models.generation import GenerationDefaults
from momaserve.models.moma import MomaModel
from momaserve.models.presets import PRESET_NAMES, preset_config
from momaserve.models.random_weights import random_model
from momaserve.models.weights import load_model, tensor_specs
from momaserve.tokens.grammar import GrammarSpec
from momaserve.tokens.processor import Processor

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
AUTO_FLOAT32_BYTES = 4 << 30
"""On a CPU, `dtype auto` is float32 up to this many bytes of float32 weights, else bfloat16."""
PRESET_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """A model and what turns requests into its tokens."""

    model: MomaModel
    processor: Processor
    name: str
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)


def load_model_parts(checkpoint: Path | str, config: EngineConfig) -> ModelParts:
    """Load a checkpoint directory; the name of a preset gives seeded random weights.

    Raises:
        CheckpointError: no such directory or preset, or a broken checkpoint.
        ConfigError: a device that is absent.
    """
    device = choose_device(config.device)
    directory = Path(checkpoint)
    if str(checkpoint) in PRESET_NAMES and not directory.exists():
        return _preset_parts(str(checkpoint), config.dtype, device)
    if not directory.is_dir():
        raise CheckpointError(
            f"{checkpoint} is neither a checkpoint directory nor one of the presets "
            f"{', '.join(PRESET_NAMES)}"
        )
    model_config = ModelConfig.load(directory)
    dtype = choose_dtype(config.dtype, device, model_config)
    return ModelParts(
        model=load_model(directory, model_config, dtype=dtype, device=device),
        processor=Processor.load(directory, model_config),
        name=directory.resolve().name,
        dtype=dtype,
        device=device,
        defaults=GenerationDefaults.load(directory),
    )


def _preset_parts(name: str, dtype_name: str, device: torch.device) -> ModelParts:
    config = preset_config(name)
    dtype = choose_dtype(dtype_name, device, config)
    return ModelParts(
        model=random_model(config, seed=PRESET_SEED, dtype=dtype, device=device),
        processor=Processor(GrammarSpec.from_config(config)),
        name=name,
        dtype=dtype,
        device=device,
    )


def choose_device(name: str) -> torch.device:
    """Raises ConfigError when CUDA is asked for and absent."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError("device cuda was asked for, but torch sees no CUDA device")
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    return torch.device(name)


def choose_dtype(name: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    """`auto` is bfloat16 on a GPU; on a CPU float32 unless the weights are too many for it."""
    if name != "auto":
        return _DTYPES[name]
    num_weights = sum(math.prod(spec.shape) for spec in tensor_specs(config).values())
    is_small = device.type == "cpu" and 4 * num_weights <= AUTO_FLOAT32_BYTES
    return torch.float32 if is_small else torch.bfloat16
