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
        metavar="PATH",
        help="the dictionary's folder, made first if it is absent; or, where the recipe's "
        'data.source is "documents", a folder or .jsonl file (default: build/dictionary)',
    )


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: all)")


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="where to compute; auto is a GPU if there is one (default: auto)",
    )
    _threads(parser)


def train_image_tokenizer(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    _data(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="image tokenizer to write; a run that was cut off resumes from here",
    )
    parser.add_argument(
        "--decoder-only",
        action="store_true",
        help="run the recipe's second stage: train the decoder of --init, keep its codes",
    )
    parser.add_argument("--init", type=Path, metavar="DIR", help="image tokenizer to start from")
    parser.add_argument(
        "--into", type=Path, metavar="CHECKPOINT", help="also put the result into this checkpoint"
    )
    _device(parser)


def _run(parser: argparse.ArgumentParser) -> None:
    """What `train` and `upcycle` have in common."""
    _recipe(parser)
    _data(parser)
    parser.add_argument(
        "--image-tokenizer",
        type=Path,
        metavar="DIR",
        help="made by train-image-tokenizer (default: that of the checkpoint to begin with; "
        "without either, documents are text alone)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint to write, in bfloat16; a run that was cut off resumes from here. "
        "DIR/run has log.jsonl and, with matplotlib, loss.png",
    )


def train(parser: argparse.ArgumentParser) -> None:
    _run(parser)
    parser.add_argument(
        "--init",
        type=Path,
        metavar="CHECKPOINT",
        help="begin with these weights, under a fresh optimizer and schedule "
        "(default: random weights)",
    )
    parser.add_argument(
        "--skip-steps",
        type=int,
        default=0,
        metavar="N",
        help="steps of data to pass over, since --init learnt them (default: 0)",
    )
    _device(parser)


def upcycle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="SEED_CHECKPOINT",
        help="a model with one expert per modality (1t1i); every expert of the recipe's groups "
        "begins as a copy, under new routers",
    )
    _run(parser)
    parser.add_argument(
        "--skip-steps",
        type=int,
        metavar="N",
        help="steps of data to pass over (default: those that the seed has learnt)",
    )
    _device(parser)


def fit_routers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    _recipe(parser)
    _data(parser)
    _device(parser)


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
