"""How fast a device reads and multiplies, found out in a moment. Rough: steps correct it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

_BUFFER_BYTES = 64 << 20
"""More than the caches of a core hold."""
_MATRIX = 512
_NUM_OPERATIONS = 50
_REPEATS = 3


class MeasuredRates(NamedTuple):
    """What a device did per second, each positive."""

    bytes_per_s: float
    flops_per_s: float
    operation_s: float
    """Of starting one small operation."""


def measure_rates(dtype: torch.dtype, device: torch.device) -> MeasuredRates:
    """Reads a buffer, multiplies two matrices and starts small operations, each a few times.

    Takes some hundredths of a second, and 64 MiB while it does.
    """
    buffer = torch.ones(_BUFFER_BYTES // dtype.itemsize, dtype=dtype, device=device)
    row = buffer[: 1 << 10].clone()
    width = len(buffer) // len(row)
    matrix = buffer[: width * len(row)].view(width, len(row))
    square = buffer[: _MATRIX * _MATRIX].view(_MATRIX, _MATRIX)
    one = torch.ones(1, device=device)

    def start_many() -> None:
        for _ in range(_NUM_OPERATIONS):
            one.add(one)

    return MeasuredRates(
        bytes_per_s=_BUFFER_BYTES / _best(lambda: matrix @ row, device),
        flops_per_s=2 * _MATRIX**3 / _best(lambda: square @ square, device),
        operation_s=_best(start_many, device) / _NUM_OPERATIONS,
    )


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of a few tries, after one that does not count."""
    times = []
    for _ in range(1 + _REPEATS):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - started)
    return max(min(times[1:]), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
