"""`momaserve train`: pretraining with batch-level expert choice."""

from __future__ import annotations

import argparse

from momaserve.training.commands.common import prepare
from momaserve.training.demo import assemble, demo_data, record_stage, text_tokenizer
from momaserve.training.pretrain import pretrain
from momaserve.training.recipe import Recipe


def run(args: argparse.Namespace) -> int:
    """Train, or resume training, into `--out`."""
    recipe = Recipe.load(args.recipe)
    corpus = prepare(args)
    tokenizer = text_tokenizer(recipe, corpus, args.out / "tokenizer.json")
    data = demo_data(recipe, corpus, args.image_tokenizer, tokenizer, "train")
    assemble(recipe, args.image_tokenizer, args.out)
    pretrain(data.config, recipe.pretrain, data.packer, data.tasks.draw, args.out)
    record_stage(args.out, "image_tokenizer", args.image_tokenizer / "run")
    record_stage(args.out, "pretrain", args.out / "run")
    print(f"checkpoint written to {args.out}; `momaserve fit-routers {args.out}` comes next")
    return 0
