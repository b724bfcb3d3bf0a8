"""From a benchmark's arguments to an engine; pictures of a preset may be made shorter."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from momaserve.config import EngineConfig
from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve.loading import (
    PRESET_SEED,
    ModelParts,
    choose_device,
    choose_dtype,
)
from momaserve.models.config import ModelConfig
from momaserve.models.presets import preset_config
from momaserve.models.random_weights import random_model
from momaserve.tokens.grammar import GrammarSpec
from momaserve.tokens.processor import Processor
from momaserve_server.cli_options import engine_config, model_source

_HIDDEN = {
    "bench",
    "config",
    "checkpoint",
    "plot",
    "profile",
    "save_result",
    "api_key",
}
"""Arguments that are no setting of what is measured, or that nobody else should see."""


def settings_of(args: argparse.Namespace, model_name: str) -> dict[str, object]:
    """What a report says of the arguments. Rates without limit become the string "inf"."""
    settings: dict[str, object] = {"model": model_name}
    for name, value in vars(args).items():
        if name not in _HIDDEN:
            settings.setdefault(name, plain(value))
    settings["model"] = model_name
    return settings


def plain(value: object) -> object:
    """`value` as JSON can say it."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and value == float("inf"):
        return "inf"
    return str(value) if isinstance(value, Path) else value


def load_engine(
    args: argparse.Namespace, *, num_requests: int, image_tokens: int | None = None
) -> Engine:
    """The engine that the arguments ask for, with room for so many requests at once.

    Args:
        num_requests: what `max_num_requests` is where nobody set it, if that is more.
        image_tokens: codes of a picture instead of the model's own; for presets only.

    Raises:
        ConfigError: settings that cannot work, or another picture length for a checkpoint.
        CheckpointError: a checkpoint that cannot be loaded.
    """
    config = _with_room(engine_config(args), args, num_requests)
    source = model_source(args)
    if image_tokens is None:
        return Engine.load(source, config)
    if not isinstance(source, str):
        raise ConfigError(
            f"--image-tokens {image_tokens} cannot change the pictures of {source.name}, a "
            "trained checkpoint: only those of a preset have any length"
        )
    return Engine(preset_parts(source, image_tokens, config), config)


def with_image_tokens(config: ModelConfig, count: int) -> ModelConfig:
    """The same model with pictures of `count` codes in one row.

    Raises:
        ConfigError: no codes, or a model without pictures.
    """
    if count < 1:
        raise ConfigError(f"a picture must have at least 1 code, got {count}")
    if config.image is None:
        raise ConfigError("this model makes no pictures")
    return replace(config, image=replace(config.image, tokens_per_image=count, grid=(1, count)))


def preset_parts(name: str, image_tokens: int, config: EngineConfig) -> ModelParts:
    """As `load_model_parts` makes them of a preset, but for the pictures' length."""
    model_config = with_image_tokens(preset_config(name), image_tokens)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, model_config)
    return ModelParts(
        model=random_model(model_config, seed=PRESET_SEED, dtype=dtype, device=device),
        processor=Processor(GrammarSpec.from_config(model_config)),
        name=name,
        dtype=dtype,
        device=device,
    )


def _with_room(config: EngineConfig, args: argparse.Namespace, num_requests: int) -> EngineConfig:
    """Raises ConfigError where `--max-num-requests` was set to less than is needed."""
    scheduler = config.scheduler
    limit = scheduler.max_num_requests
    if limit >= num_requests:
        return config
    in_file = args.config is not None and "max_num_requests" in args.config.values
    if args.max_num_requests is not None or in_file:
        raise ConfigError(
            f"max_num_requests {limit} is less than the {num_requests} requests that are to run "
            "at the same time"
        )
    queued = max(scheduler.max_queued_requests, num_requests)
    grown = replace(scheduler, max_num_requests=num_requests, max_queued_requests=queued)
    return replace(config, scheduler=grown)
