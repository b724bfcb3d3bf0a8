"""Arguments of `momaserve bench latency`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from momaserve_server.cli_options import GENERATE_OPTIONS, add_model_source, add_options

MODALITIES = ("text", "image", "mixed")
DEFAULT_ROOF_GIB = 1.0


def add_latency(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "latency",
        help="one batch at a time, beside the roof that memory bandwidth sets",
        description="Runs batches of equal requests one after the other, without a server, and "
        "compares decoding with its roof: the bytes that a step must read, over the read "
        "bandwidth measured in the same run.",
    )
    add_model_source(parser)
    parser.add_argument(
        "--modality",
        nargs="+",
        default=["text"],
        choices=MODALITIES,
        help="what the rows decode: words, the codes of one picture each, or half of them either "
        "(default: text)",
    )
    parser.add_argument(
        "--input-len", type=int, default=32, metavar="N", help="prompt tokens (default: 32)"
    )
    parser.add_argument(
        "--output-len",
        type=int,
        metavar="N",
        help="tokens that each row decodes; a preset's pictures get as many codes, a checkpoint's "
        "have their own number (default: 128, or that number where there are pictures)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        default=[8],
        metavar="N",
        help="rows that run together; one result for each (default: 8)",
    )
    parser.add_argument(
        "--num-iters", type=int, default=10, metavar="N", help="timed batches (default: 10)"
    )
    parser.add_argument(
        "--num-iters-warmup",
        type=int,
        default=2,
        metavar="N",
        help="batches before them that are not timed (default: 2)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of words and codes; 0 is greedy (default: 0)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of prompts and draws (default: 0)"
    )
    parser.add_argument(
        "--roof-gib",
        type=float,
        default=DEFAULT_ROOF_GIB,
        metavar="GIB",
        help="size of the buffer whose reading measures bandwidth, in GiB; one that fits into "
        f"caches measures those (default: {DEFAULT_ROOF_GIB:g})",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="write a trace of one more batch of each kind, for chrome://tracing (default: none)",
    )
    add_options(parser, GENERATE_OPTIONS)
