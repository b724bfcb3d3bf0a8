"""Arguments of `momaserve bench learning`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

LEARNERS = ("dense", "1t1i", "moe_8x", "4t4i", "upcycled")


def add_learning(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "learning",
        help="which architecture learns most for the same FLOPs",
        description="Trains architectures on the same rows in the same order for the same FLOPs; "
        "prints losses by modality, and eta: by what factor fewer FLOPs take one to the dense "
        "model's last training loss. A run that was cut off resumes.",
    )
    parser.add_argument("--recipe", default="demo", help="shape, data and training (default: demo)")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("build/dictionary"),
        metavar="PATH",
        help="as for train (default: build/dictionary)",
    )
    parser.add_argument(
        "--image-tokenizer", type=Path, metavar="DIR", help="made by train-image-tokenizer"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="a folder for each run, learning.json (all curves) and learning.png",
    )
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="steps of each run")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1],
        metavar="N",
        help="of weights, data and noise; every architecture is trained under each (default: 0 1)",
    )
    parser.add_argument(
        "--architectures",
        nargs="+",
        default=list(LEARNERS),
        choices=LEARNERS,
        help=f"(default: {' '.join(LEARNERS)}); upcycled is 1t1i for a quarter of the steps, "
        "then 4t4i",
    )
    parser.add_argument("--hidden-size", type=int, metavar="N", help="(default: the recipe's)")
    parser.add_argument("--num-layers", type=int, metavar="N", help="(default: the recipe's)")
    parser.add_argument(
        "--num-rows", type=int, metavar="N", help="rows of a step (default: the recipe's)"
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="a Markdown page whose results part is to be replaced, such as docs/learning.md",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="where to compute (default: auto)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: all)")
