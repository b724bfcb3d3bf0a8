"""Arguments of `momaserve bench`. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import argparse

from momaserve_bench.architectures_options import add_architectures
from momaserve_bench.depth_options import add_depth
from momaserve_bench.growth_options import add_growth
from momaserve_bench.kernels.arguments import add_kernels
from momaserve_bench.latency_options import add_latency
from momaserve_bench.learning_options import add_learning
from momaserve_bench.peers.arguments import add_peers
from momaserve_bench.scheduling_options import add_scheduling
from momaserve_bench.serve_options import add_serve
from momaserve_bench.throughput_options import add_throughput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    add_latency(commands)
    add_throughput(commands)
    add_serve(commands)
    add_scheduling(commands)
    add_growth(commands)
    add_depth(commands)
    add_kernels(commands)
    _core(commands)
    add_learning(commands)
    add_architectures(commands)
    add_peers(commands)


def _core(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
