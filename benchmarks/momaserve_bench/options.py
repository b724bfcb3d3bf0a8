"""Arguments of `momaserve bench`. Imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from momaserve_bench.latency_options import add_latency
from momaserve_bench.peers.arguments import add_peers
from momaserve_bench.scheduling_options import add_scheduling
from momaserve_bench.serve_options import add_serve
from momaserve_bench.throughput_options import add_throughput

ARCHITECTURES = ("dense", "1t1i", "moe_8x", "4t4i", "upcycled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="bench", metavar="BENCH", required=True)
    add_latency(commands)
    add_throughput(commands)
    add_serve(commands)
    add_scheduling(commands)
    _core(commands)
    _architectures(commands)
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


def _architectures(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "architectures",
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
        help="a folder for each run, architectures.json (all curves) and architectures.png",
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
        default=list(ARCHITECTURES),
        choices=ARCHITECTURES,
        help=f"(default: {' '.join(ARCHITECTURES)}); upcycled is 1t1i for a quarter of the steps, "
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
        help="a Markdown page whose results part is to be replaced, such as docs/architectures.md",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=["auto", "cpu", "cuda"],
        help="where to compute (default: auto)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="torch threads (default: all)")
