"""A fresh process from its start to the first token of a preset.

`python -m momaserve_bench.gpu.startup NAME` is that process; `start_up` starts it and measures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

TARGET_S = 60.0
"""That the first start, which compiles every kernel, is to stay within."""


class StartUpError(RuntimeError):
    """The process ended without a token."""


def start_up(command: Sequence[str], *, timeout_s: float) -> dict[str, Any]:
    """Starts the process twice: with nothing compiled before, and with what the first compiled.

    Raises:
        StartUpError: a start failed or took longer than `timeout_s`; has its last words.
    """
    with tempfile.TemporaryDirectory() as cache:
        variables = os.environ | {"TRITON_CACHE_DIR": cache}
        first, second = (_start(command, variables, timeout_s) for _ in range(2))
    return {"compiling": first, "compiled": second, "target_s": TARGET_S}


def _start(command: Sequence[str], variables: dict[str, str], timeout_s: float) -> dict[str, float]:
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, check=False, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise StartUpError(f"no first token after {timeout_s:g} s") from None
    total_s = time.monotonic() - started
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        words = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise StartUpError(f"the process ended with status {done.returncode}: {words[0]}")
    found: dict[str, float] = json.loads(lines[-1])
    return {"process_s": total_s, **found}


def command_for(preset: str) -> list[str]:
    return [sys.executable, "-m", "momaserve_bench.gpu.startup", preset]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", metavar="NAME")
    preset = parser.parse_args().preset
    started = time.monotonic()
    module = import_module("momaserve_bench.gpu.first_token")  # which is part of what is measured
    imported_s = time.monotonic() - started
    found = module.first_token(preset, started)
    print(json.dumps({"imported_s": imported_s, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
