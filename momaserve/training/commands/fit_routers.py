"""`momaserve fit-routers`: auxiliary routers and thresholds of a frozen model."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from tokenizers import Tokenizer

from momaserve.models.config import ModelConfig
from momaserve.models.weights import load_model
from momaserve.training.commands.common import prepare
from momaserve.training.demo import demo_data, record_stage
from momaserve.training.fit_routers import fit_routers
from momaserve.training.pretrain import rows_of_step
from momaserve.training.recipe import Recipe


def run(args: argparse.Namespace) -> int:
    """Fit, or resume fitting, in place: the checkpoint gains its routers at the end."""
    recipe = Recipe.load(args.recipe)
    config = ModelConfig.load(args.checkpoint)
    model = load_model(args.checkpoint, config, dtype=torch.float32, device=torch.device("cpu"))
    corpus = prepare(args)
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    data = demo_data(recipe, corpus, args.checkpoint / "image_tokenizer", tokenizer, "train")
    batches = replace(recipe.pretrain, seed=recipe.routers.seed)
    fit_routers(
        model,
        recipe.routers,
        lambda step: rows_of_step(batches, data.packer, data.tasks.draw, step),
        args.checkpoint,
    )
    record_stage(args.checkpoint, "routers", args.checkpoint / "run-routers")
    print(f"auxiliary routers and thresholds written to {args.checkpoint}")
    return 0
