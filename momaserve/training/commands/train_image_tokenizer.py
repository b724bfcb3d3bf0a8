"""`momaserve train-image-tokenizer`: pixels <-> codes on the dictionary's pictures."""

from __future__ import annotations

import argparse

from momaserve.training.commands.common import prepare
from momaserve.training.demo import install_image_tokenizer, record_stage, select_items
from momaserve.training.image_tokenizer import train_image_tokenizer
from momaserve.training.recipe import Recipe


def run(args: argparse.Namespace) -> int:
    """Train, or resume training, into `--out`."""
    recipe = Recipe.load(args.recipe)
    corpus = prepare(args)
    training = recipe.image_decoder if args.decoder_only else recipe.image_tokenizer
    kinds = frozenset(recipe.data.codes_kinds)
    if args.decoder_only or not kinds:
        splits = [select_items(corpus, recipe.data, split) for split in ("train", "held_out")]
    else:
        splits = [corpus.select(kinds, split) for split in ("train", "held_out")]
    train, held_out = (corpus.pictures[[item.id for item in items]] for items in splits)
    train_image_tokenizer(training, train, held_out, args.out, args.init)
    if args.into is not None:
        install_image_tokenizer(args.out, args.into)
        stage = "image_decoder" if args.decoder_only else "image_tokenizer"
        record_stage(args.into, stage, args.out / "run")
    print(f"image tokenizer written to {args.out}")
    return 0
