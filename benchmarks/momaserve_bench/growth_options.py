"""Arguments of `momaserve bench growth`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from momaserve_server.cli_options import GENERATE_OPTIONS, add_model_source, add_options


def add_growth(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "growth",
        help="how throughput, first tokens, decoding and memory grow with their load",
        description="Four curves without a server: tokens per second by requests at a time, time "
        "to first token by prompt length, time per token by context, memory by tokens held. Each "
        "with its local exponent, the slope between neighbours on logarithmic axes; what grows "
        "faster than it should is marked super-linear.",
    )
    add_model_source(parser)
    add = parser.add_argument
    add(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32, 64, 128],
        metavar="N",
        help="requests at the same time (default: 1 2 4 8 16 32 64 128)",
    )
    add(
        "--input-len",
        type=int,
        nargs="+",
        metavar="N",
        help="prompt tokens of the curve of first tokens (default: 128, doubled as far as the "
        "model goes, and the longest that leaves room for a token)",
    )
    add(
        "--context",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens before the first one that is decoded (default: as for --input-len)",
    )
    add(
        "--held-tokens",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens that requests hold together; none held is measured first (default: 256, "
        "doubled up to 16384, as far as KV blocks go)",
    )
    add(
        "--prompt-len",
        type=int,
        default=32,
        metavar="N",
        help="prompt tokens of each request of the curve of throughput (default: 32)",
    )
    add(
        "--output-len",
        type=int,
        default=32,
        metavar="N",
        help="tokens that requests answer with, in the curves of throughput and of decoding "
        "(default: 32)",
    )
    add(
        "--num-iters",
        type=int,
        default=3,
        metavar="N",
        help="timed runs of each point, of which the median counts (default: 3)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of prompts (default: 0)")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the four curves as a PNG file (default: none)",
    )
    add("--save-result", type=Path, metavar="FILE", help="write the line of JSON to a file too")
    add_options(parser, GENERATE_OPTIONS)
