"""`momaserve upcycle`: goes on with one expert per modality as several."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from momaserve.errors import ConfigError
from momaserve.training.commands.common import open_for, set_up, train_checkpoint
from momaserve.training.recipe import Recipe
from momaserve.training.start import data_position
from momaserve.training.upcycle import start_upcycled


def run(args: argparse.Namespace) -> int:
    """Upcycle and train, or resume training, into `--out`; the learning rate starts afresh."""
    device = set_up(args)
    recipe = Recipe.load(args.recipe)
    checkpoint: Path = args.checkpoint
    skip_steps: int | None = args.skip_steps
    if skip_steps is None:
        skip_steps = data_position(checkpoint)
    if skip_steps is None:
        raise ConfigError(
            f"{checkpoint} does not say how many steps of data it has learnt: give --skip-steps"
        )
    data, image_tokenizer = open_for(args, recipe, checkpoint)
    training = recipe.pretrain
    if training.router_noise is None:
        training = replace(training, router_noise="gumbel")
    return train_checkpoint(
        args,
        recipe,
        training,
        data,
        image_tokenizer,
        device=device,
        start=start_upcycled(checkpoint, data.config, training.seed),
        checkpoint=checkpoint,
        skip_steps=skip_steps,
    )
