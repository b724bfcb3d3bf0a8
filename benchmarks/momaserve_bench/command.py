"""`momaserve bench`: finds the benchmark that was asked for."""

from __future__ import annotations

import argparse
from importlib import import_module


def run(args: argparse.Namespace) -> int:
    code: int = import_module(f"momaserve_bench.{args.bench}").run(args)
    return code
