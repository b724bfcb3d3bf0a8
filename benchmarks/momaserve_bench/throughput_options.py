"""Arguments of `momaserve bench throughput`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from momaserve_bench.workload_options import add_workload
from momaserve_server.cli_options import GENERATE_OPTIONS, add_model_source, add_options


def add_throughput(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "throughput",
        help="words and pictures per second, without a server",
        description="Answers a mix of requests with continuous batching, so many at a time, and "
        "reports medians over runs. Prompts are encoded and pictures rendered as for a user.",
    )
    add_model_source(parser)
    add_workload(parser, num_prompts=64, is_served=False)
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[32],
        metavar="N",
        help="requests at the same time; one result for each (default: 32)",
    )
    parser.add_argument(
        "--num-iters", type=int, default=3, metavar="N", help="timed runs of each (default: 3)"
    )
    parser.add_argument(
        "--image-tokens",
        type=int,
        metavar="N",
        help="codes of a picture; for presets only (default: the model's)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw throughput against concurrency as a PNG file (default: none)",
    )
    add_options(parser, GENERATE_OPTIONS)
