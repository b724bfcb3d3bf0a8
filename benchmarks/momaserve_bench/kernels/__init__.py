"""`momaserve bench kernels`: every compiled kernel beside its twin in torch, and its roofs."""

from __future__ import annotations

import argparse
from importlib import import_module


def run(args: argparse.Namespace) -> int:
    """The command itself is found here, so that `--help` need not load it."""
    code: int = import_module("momaserve_bench.kernels.command").run(args)
    return code
