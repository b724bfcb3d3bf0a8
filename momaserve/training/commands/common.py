"""What the training commands share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from momaserve.errors import ConfigError
from momaserve.training.assembly import assemble, keep_text_tokenizer, record_seed, record_stage
from momaserve.training.data import TrainingData, open_data
from momaserve.training.pretrain import PretrainConfig, pretrain
from momaserve.training.recipe import Recipe
from momaserve.training.start import Start


def set_threads(args: argparse.Namespace) -> None:
    """Raises ConfigError for fewer threads than one."""
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)


def set_up(args: argparse.Namespace) -> torch.device:
    """Set the threads and find the device.

    Raises:
        ConfigError: there is no such device.
    """
    set_threads(args)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this torch sees no GPU")
    return torch.device(name)


def image_tokenizer_of(args: argparse.Namespace, checkpoint: Path | None) -> Path | None:
    """The one given, else that of the checkpoint that training begins with, if there is one."""
    given: Path | None = args.image_tokenizer
    if given is None and checkpoint is not None:
        own = checkpoint / "image_tokenizer"
        return own if own.exists() else None
    return given


def open_for(
    args: argparse.Namespace, recipe: Recipe, checkpoint: Path | None
) -> tuple[TrainingData, Path | None]:
    """Data and image tokenizer of a run that begins with `checkpoint`, if it is not None."""
    if args.skip_steps is not None and args.skip_steps < 0:
        raise ConfigError(f"--skip-steps must be at least 0, got {args.skip_steps}")
    if checkpoint is not None:
        keep_text_tokenizer(checkpoint, args.out)
    image_tokenizer = image_tokenizer_of(args, checkpoint)
    data = open_data(recipe, args.data, image_tokenizer, args.out)
    print(data.summary, file=sys.stderr)
    return data, image_tokenizer


def train_checkpoint(
    args: argparse.Namespace,
    recipe: Recipe,
    training: PretrainConfig,
    data: TrainingData,
    image_tokenizer: Path | None,
    *,
    device: torch.device,
    start: Start | None,
    checkpoint: Path | None,
    skip_steps: int,
) -> int:
    """Train into `args.out` and put beside the weights what serving needs."""
    out: Path = args.out
    assemble(
        out,
        chat_template=data.chat_template,
        generation=recipe.generation,
        image_tokenizer=image_tokenizer,
    )
    pretrain(
        data.config,
        training,
        data.rows_of_step,
        out,
        validation=data.validation_batches() if training.validate_every else (),
        start=start,
        skip_steps=skip_steps,
        fingerprint=data.fingerprint,
        device=device,
        plot=True,
    )
    if checkpoint is not None:
        record_seed(out, checkpoint)
    if image_tokenizer is not None and (image_tokenizer / "run" / "run.json").exists():
        record_stage(out, "image_tokenizer", image_tokenizer / "run")
    record_stage(out, "pretrain", out / "run")
    has_routers = any(group.has_router for group in data.config.expert_groups)
    next_step = f"; `momaserve fit-routers {out}` comes next" if has_routers else ""
    print(f"checkpoint written to {out}{next_step}")
    return 0
