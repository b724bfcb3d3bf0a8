"""`momaserve fit-routers`: auxiliary routers and thresholds of a frozen model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from momaserve.models.config import ModelConfig
from momaserve.models.weights import load_model
from momaserve.training.assembly import record_stage
from momaserve.training.commands.common import set_up
from momaserve.training.data import open_data
from momaserve.training.fit_routers import fit_routers
from momaserve.training.recipe import Recipe, needed


def run(args: argparse.Namespace) -> int:
    """Fit, or resume fitting, in place: the checkpoint gains its routers at the end."""
    device = set_up(args)
    recipe = Recipe.load(args.recipe)
    routers = needed(recipe.routers, "routers")
    checkpoint: Path = args.checkpoint
    config = ModelConfig.load(checkpoint)
    model = load_model(checkpoint, config, dtype=torch.float32, device=device)
    pictures = None if config.image is None else checkpoint / "image_tokenizer"
    data = open_data(recipe, args.data, pictures, checkpoint, seed=routers.seed)
    fit_routers(model, routers, data.rows_of_step, checkpoint)
    record_stage(checkpoint, "routers", checkpoint / "run-routers")
    print(f"auxiliary routers and thresholds written to {checkpoint}")
    return 0
