"""Attention reads nothing behind its inputs, not even what it then throws away."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="only the CPU has guard pages")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.kernels.triton.guard", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_nothing_behind_the_inputs_is_read() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr


def test_reading_on_would_be_noticed() -> None:
    assert run("beyond").returncode == -signal.SIGSEGV
