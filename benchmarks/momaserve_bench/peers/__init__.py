"""`momaserve bench peers`: momaserve beside other engines, on equal shapes and threads."""

from __future__ import annotations

import argparse
from importlib import import_module


def run(args: argparse.Namespace) -> int:
    """The command itself is found here, so that `--help` need not load it."""
    code: int = import_module("momaserve_bench.peers.comparison").run(args)
    return code
