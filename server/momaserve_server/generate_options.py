"""Arguments of `momaserve generate`; `generate.py` carries it out."""

from __future__ import annotations

import argparse
from pathlib import Path

from momaserve.sampling import OutputMode
from momaserve_server.cli_options import GENERATE_OPTIONS, add_model_source, add_options

DEFAULT_OUT = Path("momaserve.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_source(parser)
    request = parser.add_argument_group("request")
    request.add_argument("--prompt", metavar="TEXT", help="what to ask")
    request.add_argument(
        "--image",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a picture to put before the prompt; may be given several times",
    )
    request.add_argument(
        "--mode",
        choices=[str(mode) for mode in OutputMode],
        default=str(OutputMode.TEXT),
        help="what the answer may hold (default: text)",
    )
    request.add_argument("--n", type=int, default=1, help="answers to make (default: 1)")
    request.add_argument("--seed", type=int, help="fixes the random choices (default: a fresh one)")
    request.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest answer, in tokens (default: no limit)"
    )
    request.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends the answer where it occurs",
    )
    for prefix, what in (("", "text"), ("image-", "picture")):
        request.add_argument(
            f"--{prefix}temperature", type=float, metavar="T", help=f"of {what} tokens; 0 is greedy"
        )
        request.add_argument(
            f"--{prefix}top-k",
            type=int,
            metavar="K",
            help=f"likeliest {what} tokens to choose from",
        )
        request.add_argument(
            f"--{prefix}top-p", type=float, metavar="P", help=f"share of {what} probability to keep"
        )
    request.add_argument(
        "--guidance-scale",
        type=float,
        metavar="G",
        help="how closely pictures follow the prompt; 1 is no guidance (default: the checkpoint's)",
    )
    request.add_argument(
        "--min-tokens", type=int, metavar="N", help="shortest answer, in tokens (default: 0)"
    )
    for name, default, where in (
        ("repetition", 1, "in prompt or answer"),
        ("presence", 0, "in the answer"),
        ("frequency", 0, "in the answer, by how often"),
    ):
        request.add_argument(
            f"--{name}-penalty",
            type=float,
            metavar="P",
            help=f"on text tokens that are {where} (default: {default}, none)",
        )
    request.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="FILE",
        help=f"PNG file for the picture; several get numbers before the suffix; a directory "
        f"holds {DEFAULT_OUT} (default: {DEFAULT_OUT})",
    )
    add_options(parser, GENERATE_OPTIONS)
