"""Arguments of `momaserve bench depth`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from momaserve_server.cli_options import GENERATE_OPTIONS, add_model_source, add_options


def add_depth(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "depth",
        help="what mixture of depths saves in K/V and time, against the same model without it",
        description="Runs a model with depth routing and its twin, the same shape with every "
        "layer taking every token, in turns in one process: K/V bytes per token, requests held in "
        "equal memory, prefill and decoding, each beside what bytes and operations predict.",
    )
    add_model_source(parser)
    parser.add_argument(
        "--input-len", type=int, default=32, metavar="N", help="prompt tokens (default: 32)"
    )
    parser.add_argument(
        "--output-len", type=int, default=64, metavar="N", help="tokens decoded (default: 64)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        default=[1, 16],
        metavar="N",
        help="rows that decode together (default: 1 16)",
    )
    parser.add_argument(
        "--context-len",
        type=int,
        default=2048,
        metavar="N",
        help="prompt tokens of the row that decodes behind a long context, and of the prefill "
        "(default: 2048)",
    )
    parser.add_argument(
        "--held-len",
        type=int,
        default=512,
        metavar="N",
        help="prompt tokens of the requests that are held in memory (default: 512)",
    )
    parser.add_argument(
        "--held",
        type=int,
        default=8,
        metavar="N",
        help="of them, those that the twin's memory has room for, at least (default: 8)",
    )
    parser.add_argument(
        "--num-iters", type=int, default=5, metavar="N", help="timed runs of each (default: 5)"
    )
    parser.add_argument(
        "--roof-gib",
        type=float,
        default=1.0,
        metavar="GIB",
        help="size of the buffer whose reading measures bandwidth (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts (default: 0)")
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="write the JSON line here")
    add_options(parser, GENERATE_OPTIONS)
