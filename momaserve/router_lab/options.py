"""Arguments of `momaserve router-report`. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

PARTS = ("policies", "noise", "thresholds", "shift", "generation", "better-routers")
DEFAULT_PARTS = PARTS[:-1]
"""Fitting routers takes longer than the rest, so it is done when it is asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures what causal routing costs a checkpoint: how well its routers imitate expert "
        "choice, and what that does to losses, generation, and under noise and shift. Writes "
        "report.json, report.html and PNG plots. A run that was cut off resumes; parts that are "
        "there are kept. The checkpoint is not changed."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help='"demo" (the dictionary in build/dictionary, made first if it is absent), the folder '
        "of a dictionary, or your own folder or .jsonl file",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the report"
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="a shipped recipe's name or a TOML file: rows are packed and held out as it says "
        '(default: "demo" for the dictionary, "documents" for your own data)',
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(DEFAULT_PARTS),
        metavar="PART",
        help=f"out of {', '.join(PARTS)} (default: all but the last)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rows and few points, for a first look"
    )
    parser.add_argument(
        "--batches", type=int, metavar="N", help="scored batches of each split (default: 10)"
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help="resamples of documents for intervals (default: 1000)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="items of each split whose pictures are drawn and named (default: 150)",
    )
    parser.add_argument(
        "--fit-steps",
        type=int,
        metavar="N",
        help="steps that the better routers are fitted for (default: 400)",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="CHECKPOINT",
        help="a model of the same tokens without depth routing: at which noise is it better?",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of rows, noise, resamples and answers (default: 0)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="where to compute; auto is a GPU if there is one (default: auto)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: all)")
