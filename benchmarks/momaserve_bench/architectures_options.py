"""Arguments of `momaserve bench architectures`. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from momaserve_bench.latency_options import DEFAULT_ROOF_GIB, MODALITIES

SIZES = ("90m", "435m")
DENSE = "dense"
"""What the others are compared with."""
PRESETS = {
    DENSE: "moma-{size}-dense",
    "moe_8x": "moma-{size}-moe-8x",
    "1t1i": "moma-{size}-1t1i",
    "4t4i": "moma-{size}-4t4i",
}
LOGS = Path("build/architectures")


def add_architectures(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "architectures",
        help="dense, moe_8x, 1t1i and 4t4i of equal FLOPs: speed, memory, bytes touched",
        description="Runs architectures of one size and equal active FLOPs in turn, in rounds, on "
        "the CPU, each in a process of its own with random weights: prefill and decode tokens/s, "
        "memory, and the bytes that a decoding step touches.",
    )
    add = parser.add_argument
    names = list(PRESETS)
    add("--size", default="435m", choices=SIZES, help="presets moma-SIZE-* (default: 435m)")
    add(
        "--architectures",
        nargs="+",
        default=names,
        choices=names,
        help=f"which to run; ratios need {DENSE} (default: {' '.join(names)})",
    )
    add(
        "--modality",
        nargs="+",
        default=list(MODALITIES),
        choices=MODALITIES,
        help="what the rows decode: words, codes of pictures, or half of them either; a batch of "
        f"one row has no halves (default: {' '.join(MODALITIES)})",
    )
    add(
        "--batch-sizes",
        type=int,
        nargs="+",
        default=[1, 4, 16],
        metavar="N",
        help="rows that decode together (default: 1 4 16)",
    )
    for flag, default, what in (
        ("--input-len", 32, "tokens of a prompt"),
        ("--output-len", 64, "tokens that each row decodes, pictures have as many codes"),
        ("--prefill-len", 1024, "words of the prompt whose first token is timed; 0 leaves it out"),
        ("--rounds", 5, "timed runs of each"),
        ("--seed", 0, "of prompts"),
    ):
        add(flag, type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="of words and codes; 0 is greedy, which goes round in circles with random weights and "
        "then meets few experts (default: 1)",
    )
    add(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float32"],
        help="of weights (default: bfloat16)",
    )
    add("--threads", type=int, metavar="N", help="of each engine (default: all cores allowed)")
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
        "--roof-gib",
        type=float,
        default=DEFAULT_ROOF_GIB,
        metavar="GIB",
        help="size of the buffer whose reading measures bandwidth, in GiB "
        f"(default: {DEFAULT_ROOF_GIB:g})",
    )
    add(
        "--logs",
        type=Path,
        default=LOGS,
        metavar="DIR",
        help=f"where each engine's own messages go (default: {LOGS})",
    )
    add("--save-result", type=Path, metavar="FILE", help="write the line of JSON to a file too")
    add("--plot", type=Path, metavar="FILE", help="PNG of bars (needs matplotlib)")
    add(
        "--page",
        type=Path,
        metavar="FILE",
        help="a Markdown page whose results part is to be replaced, such as docs/architectures.md; "
        "architectures.png is put beside it (needs matplotlib)",
    )
