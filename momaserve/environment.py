"""Where and with what something is measured."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import momaserve


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
