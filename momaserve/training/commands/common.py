"""What the training commands share."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import momaserve
from momaserve.training.dictionary.build import build
from momaserve.training.dictionary.corpus import Corpus


def prepare(args: argparse.Namespace) -> Corpus:
    """Set the threads and load the dictionary, making it first where it is absent.

    Raises:
        DataError: the Debian packages that it is made from are missing.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not (args.data / "items.jsonl").exists():
        print(f"making the dictionary in {args.data}", file=sys.stderr)
        build(args.data)
    return Corpus.load(args.data)


def machine() -> dict[str, Any]:
    """Where and with what something was measured."""
    return {
        "momaserve": momaserve.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
