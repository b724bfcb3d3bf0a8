"""Arguments of `momaserve bench`. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    core = commands.add_parser(
        "core",
        help="what planning a step costs, and what a cached token takes",
        description="Time of schedule() and update() without any model, and KV bytes per token.",
    )
    core.add_argument(
        "--running",
        type=int,
        nargs="+",
        default=[64, 512],
        metavar="N",
        help="running requests to measure with (default: 64 512)",
    )
    core.add_argument(
        "--steps", type=int, default=400, metavar="N", help="steps to measure (default: 400)"
    )
    core.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[100, 512, 2048],
        metavar="N",
        help="tokens per request of the memory table (default: 100 512 2048)",
    )
    core.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per block (default: 16)"
    )
    core.add_argument(
        "--preset",
        default="moma-90m-4t4i",
        metavar="NAME",
        help="shape of the memory table (default: moma-90m-4t4i)",
    )
    core.add_argument("--seed", type=int, default=0, help="of tokens and lengths (default: 0)")
