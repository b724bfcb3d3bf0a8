"""Arguments of `momaserve bench scheduling`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

SIZES = ("90m", "435m", "1.4b")
"""Presets moma-SIZE-4t4i."""
MACHINES = ("cpu", "h200")


def add_scheduling(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "scheduling",
        help="router-aware scheduling against first come, first served",
        description="Runs the real scheduler without a model, against a clock that predicted "
        "step times move. Requests for words and for pictures, in equal numbers of tokens, are "
        "offered below and above what first come, first served can serve; both policies serve "
        "the same requests at the same times.",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=list(SIZES),
        choices=SIZES,
        help=f"presets moma-SIZE-4t4i (default: {' '.join(SIZES)})",
    )
    parser.add_argument(
        "--machines",
        nargs="+",
        default=list(MACHINES),
        choices=MACHINES,
        help="cpu: 23 GB/s, 150 GFLOP/s, 1 ms a step; h200: 4.3 TB/s, 700 TFLOP/s, 0.3 ms a step "
        "(default: both)",
    )
    _numbers(parser, "--slots", int, [4, 8, 16], "requests that run at the same time")
    _numbers(parser, "--loads", float, [0.7, 1.5], "offered, over first come's capacity")
    _numbers(parser, "--seeds", int, [0, 1, 2], "of requests, arrivals and noise")
    for flag, default, what in (
        ("--num-requests", 400, "requests of a run"),
        ("--prompt-tokens", 32, "mean tokens of a prompt, all of them text"),
        ("--image-tokens", 64, "tokens of a picture, and the mean of an answer in words"),
        ("--max-num-step-tokens", 1024, "new tokens of one step"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    parser.add_argument(
        "--max-num-passes",
        type=int,
        metavar="N",
        help="younger requests that may start before one (default: 4 times the slots)",
    )
    parser.add_argument(
        "--step-time-target-ms",
        type=float,
        metavar="MS",
        help="what prompts fill a step up to, under router-aware scheduling (default: none)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.05,
        metavar="SIGMA",
        help="standard deviation of the logarithm of a step's time (default: 0.05)",
    )
    parser.add_argument(
        "--belief",
        type=float,
        default=0.5,
        metavar="X",
        help="what the scheduler takes the memory bandwidth for at first, over what it is "
        "(default: 0.5)",
    )
    parser.add_argument(
        "--ttft-target-ms",
        type=float,
        metavar="MS",
        help="of goodput: arrival to first token (default: one answer's time with full slots)",
    )
    parser.add_argument(
        "--itl-target-ms",
        type=float,
        metavar="MS",
        help="of goodput: mean time between tokens (default: 1.5 times a step of full slots)",
    )
    parser.add_argument(
        "--confirm",
        action="store_true",
        help="run the first size with 2 slots and 2 loads on the real engine too, here and now",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="PNG of the tokens per second (needs matplotlib)"
    )
    parser.add_argument("--save-result", type=Path, metavar="FILE", help="where the JSON goes too")


def _numbers(
    parser: argparse.ArgumentParser, flag: str, kind: type, default: list[float], what: str
) -> None:
    shown = " ".join(map(str, default))
    parser.add_argument(
        flag, type=kind, nargs="+", default=default, metavar="N", help=f"{what} (default: {shown})"
    )
