"""Arguments of `momaserve bench peers`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from momaserve_bench.peers.environments import RECIPES, ROOT

PAIRS = {
    "dense": "moma-435m-dense",
    "moe_8x": "moma-435m-moe-8x",
    "4t4i": "moma-435m-4t4i",
}
"""Our preset of each pair; the others run a Llama or Mixtral of the same dimensions."""


def add_peers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "peers",
        help="momaserve beside vLLM, transformers and llama.cpp",
        description="Runs momaserve and other engines in turn, in rounds, on the CPU: same "
        "dimensions, dtype, threads and prompts, random weights, greedy, no early stop. The others "
        "live in environments that `make peers` makes.",
    )
    add = parser.add_argument
    peers, pairs = list(RECIPES), list(PAIRS)
    add("--peers", nargs="+", default=peers, choices=peers, help=f"(default: {' '.join(peers)})")
    add("--pairs", nargs="+", default=pairs, choices=pairs, help=f"(default: {' '.join(pairs)})")
    add(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=[1, 8, 32],
        metavar="N",
        help="rows that decode together (default: 1 8 32)",
    )
    add("--input-len", type=int, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    add(
        "--output-len",
        type=int,
        default=64,
        metavar="N",
        help="new tokens of each row; the first is not counted as decoded (default: 64)",
    )
    add(
        "--prefill-len",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of the one prompt whose first token is timed; 0 leaves it out (default: 1024)",
    )
    add("--rounds", type=int, default=5, metavar="N", help="timed runs of each (default: 5)")
    add(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="of weights (default: bfloat16)",
    )
    add("--threads", type=int, metavar="N", help="of each engine (default: all cores allowed)")
    add("--seed", type=int, default=0, help="of weights and prompts (default: 0)")
    add(
        "--pause",
        type=float,
        default=0.5,
        metavar="S",
        help="seconds between two runs, in which threads of the last fall asleep (default: 0.5)",
    )
    add(
        "--timeout",
        type=float,
        default=1800.0,
        metavar="S",
        help="seconds after which an engine that does not answer is given up (default: 1800)",
    )
    add(
        "--environments",
        type=Path,
        default=ROOT,
        metavar="DIR",
        help=f"what `make peers` made; models and logs go there too (default: {ROOT})",
    )
    add("--save-result", type=Path, metavar="FILE", help="write the line of JSON to a file too")
