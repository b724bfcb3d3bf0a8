"""`momaserve train`: pretraining with batch-level expert choice."""

from __future__ import annotations

import argparse
from pathlib import Path

from momaserve.training.commands.common import open_for, set_up, train_checkpoint
from momaserve.training.recipe import Recipe
from momaserve.training.start import start_from


def run(args: argparse.Namespace) -> int:
    """Train, or resume training, into `--out`."""
    device = set_up(args)
    recipe = Recipe.load(args.recipe)
    checkpoint: Path | None = args.init
    data, image_tokenizer = open_for(args, recipe, checkpoint)
    return train_checkpoint(
        args,
        recipe,
        recipe.pretrain,
        data,
        image_tokenizer,
        device=device,
        start=None if checkpoint is None else start_from(checkpoint, data.config),
        checkpoint=checkpoint,
        skip_steps=args.skip_steps,
    )
