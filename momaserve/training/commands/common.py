"""What the training commands share."""

from __future__ import annotations

import argparse
import sys

import torch

from momaserve.training.dictionary.build import build
from momaserve.training.dictionary.corpus import Corpus


def prepare(args: argparse.Namespace) -> Corpus:
    """Set the threads and load the dictionary, making it first where it is absent.

    Raises:
        DataError: the Debian packages that it is made from are missing.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not (args.data / "items.jsonl").exists():
        print(f"making the dictionary in {args.data}", file=sys.stderr)
        build(args.data)
    return Corpus.load(args.data)
