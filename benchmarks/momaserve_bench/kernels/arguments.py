"""Arguments of `momaserve bench kernels`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from momaserve_server.cli_options import add_checkpoint

FAMILIES = ("linear", "experts", "attention", "routing", "glue", "sampling")
"""Groups of kernels; every backend's table has all of them."""


def add_kernels(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "kernels",
        help="every compiled kernel beside its twin in torch, and its roofs",
        description="Compares each compiled kernel with its twin in torch on random inputs of a "
        "model's shapes, then times both by turns. Weights are random: a checkpoint gives its "
        "shapes alone. The exit status is 1 if a result differs.",
    )
    add_checkpoint(parser)
    add = parser.add_argument
    add("--preset", metavar="NAME", help="a named shape instead of a checkpoint")
    families = list(FAMILIES)
    add(
        "--kernels",
        nargs="+",
        default=families,
        choices=families,
        help=f"which (default: {' '.join(families)})",
    )
    add(
        "--rows",
        type=int,
        nargs="+",
        default=[1, 4, 8, 16, 32, 256],
        metavar="N",
        help="tokens that a step computes; one result for each (default: 1 4 8 16 32 256)",
    )
    add(
        "--context",
        type=int,
        nargs="+",
        default=[128, 1024],
        metavar="N",
        help="tokens that each row of attention sees (default: 128 1024)",
    )
    add(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of weights and of K/V (default: float32)",
    )
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's own)")
    add("--num-iters", type=int, default=30, metavar="N", help="timed turns (default: 30)")
    add(
        "--warm-cache",
        action="store_true",
        help="use the same weights in every turn, so that they stay in caches if they fit "
        "(default: off)",
    )
    add(
        "--memory-gib",
        type=float,
        default=1.0,
        metavar="GIB",
        help="memory for the copies of one kernel's weights that are used by turns, and for what "
        "goes with them; kernels that need more are left out by name (default: 1)",
    )
    add(
        "--roof-gib",
        type=float,
        default=1.0,
        metavar="GIB",
        help="size of the buffer whose reading measures bandwidth, in GiB (default: 1)",
    )
    add(
        "--gemm-size",
        type=int,
        default=2048,
        metavar="N",
        help="rows and columns of the square product that measures arithmetic (default: 2048)",
    )
    add(
        "--pause-ms",
        type=float,
        metavar="MS",
        help="between turns, for the threads of the one before to fall asleep (default: 0 with "
        "one thread, else 25)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of weights and inputs (default: 0)")
    add("--save-result", type=Path, metavar="FILE", help="write the line of JSON to a file too")
