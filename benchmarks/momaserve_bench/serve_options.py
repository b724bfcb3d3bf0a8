"""Arguments of `momaserve bench serve`. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from momaserve_bench.workload_options import add_workload
from momaserve_server.cli_options import (
    ENGINE_OPTIONS,
    PROMPT_ROUTING_OPTION,
    ROUTING_OPTION,
    add_model_source,
    add_options,
)

KEY_VARIABLE = "MOMASERVE_API_KEY"
GOODPUT_METRICS = ("ttft", "tpot", "itl", "e2el", "image_latency")
METRICS = (
    *GOODPUT_METRICS,
    "first_partial_image",
    "first_byte",
    "probe",
    "scheduled_ttft",
    "scheduled_e2el",
    "scheduled_image_latency",
)
"""Durations that have a mean, a median, a deviation and percentiles."""
MAX_PARTIAL_IMAGES = 3
"""Of `POST /v1/images/generations`."""
MODEL_OPTIONS = (ROUTING_OPTION, PROMPT_ROUTING_OPTION, *ENGINE_OPTIONS)
"""Settings of a server of one's own, and of the engine of `--offline-baseline`."""


def add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="what clients of a server see: latencies, goodput, pictures per second",
        description="Sends requests to a server at the times that --request-rate draws, whether "
        "earlier ones are answered or not, and reports what each of them saw, both from when it "
        "was due and from when it was sent. Without --base-url it starts a server of its own.",
    )
    add_model_source(parser)
    _add_target(parser)
    add_workload(parser, num_prompts=100, is_served=True)
    _add_arrivals(parser)
    _add_report(parser)
    add_options(parser, MODEL_OPTIONS)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-url",
        metavar="URL",
        help="a server that runs already, such as http://127.0.0.1:8000 (default: a fresh one of "
        "CHECKPOINT or --preset, which ends with the benchmark)",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(KEY_VARIABLE),
        help=f"the server's key (default: ${KEY_VARIABLE}, or none)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="model in the requests (default: the server's first)"
    )
    parser.add_argument(
        "--ready-check",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds to wait for the server of --base-url to be ready (default: 0, it must be)",
    )


def _add_arrivals(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--request-rate",
        type=float,
        nargs="+",
        default=[float("inf")],
        metavar="RATE",
        help="requests per second on average, inf for all at once; one result for each "
        "(default: inf)",
    )
    parser.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="shape of the gamma distribution of gaps: 1 is a Poisson process, less comes in "
        "bursts, more is even (default: 1)",
    )
    parser.add_argument(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="requests under way at most; one that is due then waits in the client, which counts "
        "from when it was due (default: no limit)",
    )
    parser.add_argument(
        "--partial-images",
        type=int,
        default=1,
        choices=range(MAX_PARTIAL_IMAGES + 1),
        help="unfinished states of each picture that are asked for (default: 1)",
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="limits in ms that a good request keeps, such as ttft:200 e2el:5000; names are "
        f"{', '.join(GOODPUT_METRICS)}; itl is the longest gap of a request (default: none)",
    )
    parser.add_argument(
        "--percentile-metrics",
        default=",".join(METRICS),
        metavar="NAMES",
        help=f"durations that get percentiles, with commas between (default: {','.join(METRICS)})",
    )
    parser.add_argument(
        "--metric-percentiles",
        default="50,99",
        metavar="NUMBERS",
        help="percentiles, with commas between (default: 50,99)",
    )
    parser.add_argument(
        "--offline-baseline",
        action="store_true",
        help="also answer the same requests without a server, and say what HTTP costs",
    )
    parser.add_argument(
        "--baseline-iters",
        type=int,
        default=3,
        metavar="N",
        help="runs of either side of that comparison; medians count (default: 3)",
    )
    parser.add_argument(
        "--save-result",
        type=Path,
        metavar="FILE",
        help="write the result with a record of every request as JSON (default: none)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the distribution of latencies, and throughput if there are several rates, as "
        "a PNG file (default: none)",
    )
