"""Arguments of the training commands. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", default="demo", help="a shipped recipe's name or a TOML file (default: demo)"
    )


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("build/dictionary"),
        metavar="DIR",
        help="the dictionary; made first if it is absent (default: build/dictionary)",
    )


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: all)")


def train_image_tokenizer(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    _data(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="run the recipe's second stage: train the decoder of --init, keep its codes",
    )
    parser.add_argument("--init", type=Path, metavar="DIR", help="image tokenizer to start from")
    parser.add_argument(
        "--into", type=Path, metavar="CHECKPOINT", help="also put the result into this checkpoint"
    )
    _threads(parser)


def train(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    _data(parser)
    parser.add_argument("--image-tokenizer", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint to write; a run that was cut off resumes from here",
    )
    _threads(parser)


def fit_routers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    _recipe(parser)
    _data(parser)
    _threads(parser)


def eval_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        metavar="CHECKPOINT",
        help="directory (default: the embedded demo)",
    )
    _recipe(parser)
    _data(parser)
    parser.add_argument(
        "--routing",
        nargs="+",
        default=["causal"],
        choices=["causal", "calibrated", "expert_choice", "threshold"],
        help="policies to score the tasks under; expert_choice routes the prompt, and its "
        "answers causally (default: causal)",
    )
    parser.add_argument("--samples", type=int, default=300, help="items per task (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="draws items and answers (default: 0)")
    parser.add_argument(
        "--loss-batches",
        type=int,
        default=40,
        help="batches for losses and router agreement; 0 leaves them out (default: 40)",
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument(
        "--card",
        action="store_true",
        help="write the model card and its notices into the checkpoint",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="write 100 pairs of wanted and drawn pictures"
    )
    _threads(parser)
