"""`momaserve train-image-tokenizer`: pixels <-> codes on the pictures of a data set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from momaserve.models.image_tokenizer import ImageTokenizerConfig
from momaserve.training.assembly import install_image_tokenizer, record_stage
from momaserve.training.commands.common import set_up
from momaserve.training.data import open_corpus
from momaserve.training.demo import select_items
from momaserve.training.documents.pictures import pictures
from momaserve.training.documents.settings import DocumentSettings
from momaserve.training.image_tokenizer import ImageTokenizerTraining, train_image_tokenizer
from momaserve.training.recipe import Recipe, needed


def run(args: argparse.Namespace) -> int:
    """Train, or resume training, into `--out`."""
    device = set_up(args)
    recipe = Recipe.load(args.recipe)
    stage = "image_decoder" if args.decoder_only else "image_tokenizer"
    training = needed(recipe.image_decoder if args.decoder_only else recipe.image_tokenizer, stage)
    train, held_out = _pictures(recipe, training, args)
    train_image_tokenizer(training, train, held_out, args.out, args.init, device=device)
    if args.into is not None:
        install_image_tokenizer(args.out, args.into)
        record_stage(args.into, stage, args.out / "run")
    print(f"image tokenizer written to {args.out}")
    return 0


def _pictures(
    recipe: Recipe, training: ImageTokenizerTraining, args: argparse.Namespace
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Pictures to train on and others, uint8 [N, S, S, 3]."""
    path: Path = args.data
    if isinstance(recipe.data, DocumentSettings):
        side = ImageTokenizerConfig.from_dict(training.model).image_size
        share = recipe.data.validation_share
        found = pictures(path, side, held_out_share=share, seed=recipe.data.seed)
        print(f"{len(found.train):,} pictures, {len(found.held_out):,} held out", file=sys.stderr)
        if found.skips.total:
            print(f"skipped {found.skips.total:,}{found.skips}", file=sys.stderr)
        return found.train, found.held_out
    corpus, data = open_corpus(path, recipe), recipe.dictionary
    kinds = frozenset(data.codes_kinds)
    if args.decoder_only or not kinds:
        splits = [select_items(corpus, data, split) for split in ("train", "held_out")]
    else:
        splits = [corpus.select(kinds, split) for split in ("train", "held_out")]
    train, held_out = (corpus.pictures[[item.id for item in items]] for items in splits)
    return train, held_out
