"""Runs a contest: results first, then times, by turns and with weights that no cache holds."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from momaserve.errors import ConfigError
from momaserve_bench.kernels.case import KERNEL, Case, Contest, Ready
from momaserve_bench.roof import measure_read_bandwidth

COLD_FACTOR = 2
"""Between two uses of one copy, so many times the last-level cache goes by."""
_FILLER_GRAINS = 32
_GEMM_PASSES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPlan:
    """How the weights of a case are kept out of caches."""

    copies: int
    filler_bytes: int
    """Read once before each cycle through the copies, where they alone are too few."""
    is_cold: bool | None
    """Whether no copy can come from the last-level cache; None if its size is unknown."""


def plan_copies(
    case: Case, *, cache_bytes: int | None, memory_bytes: int, num_iters: int, is_warm: bool
) -> CopyPlan | None:
    """As many copies as it takes, or as the turns use, or as there is memory for.

    Args:
        cache_bytes: of the last-level cache; None, if unknown, takes all of the memory.
        memory_bytes: what copies, filler and the case's other tensors may take.

    Returns:
        None when there is no room for one copy.
    """
    room = memory_bytes - case.held_bytes
    if case.state_bytes > room:
        return None
    if is_warm or not case.state_bytes:
        return CopyPlan(copies=1, filler_bytes=0, is_cold=False)
    target = room if cache_bytes is None else COLD_FACTOR * cache_bytes
    copies = min(num_iters, -(-target // case.touched_bytes), room // case.state_bytes)
    touched = copies * case.touched_bytes
    filler = max(0, min(target - touched, room - copies * case.state_bytes))
    filler -= filler % max(1, target // _FILLER_GRAINS)  # so that many cases share one
    is_cold = None if cache_bytes is None else touched + filler > cache_bytes
    return CopyPlan(copies=copies, filler_bytes=filler, is_cold=is_cold)


class Filler:
    """A buffer that is read to push everything else out of caches; made when first needed."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def resize(self, num_bytes: int) -> None:
        """Keeps a buffer that is as large already."""
        if self._buffer.nbytes != num_bytes // 4 * 4:
            self._buffer = torch.empty(0)  # before the next one is made
            self._buffer = torch.ones(num_bytes // 4)  # written: untouched pages may all be one

    def read(self) -> None:
        torch.sum(self._buffer)


@dataclass(slots=True)
class Outcome:
    """What a contest brought."""

    errors: dict[str, float]
    """By contender."""
    differing: list[str]
    """Contenders beyond their tolerance; then nothing was timed."""
    seconds: dict[str, list[float]] = field(default_factory=dict)


def hold(
    contest: Contest, plan: CopyPlan, *, num_iters: int, filler: Filler, pause_s: float
) -> Outcome:
    """Compares all results with what is right; if they are, times the contenders by turns.

    Every turn runs each of them once, on the same copy's weights, and begins with another one,
    so that drift and the place in the turn hit all alike.
    """
    ready = [[one.make() for one in contest.contenders] for _ in range(plan.copies)]
    errors: dict[str, float] = {}
    differing: list[str] = []
    for contender, mine in zip(contest.contenders, ready[0], strict=True):
        mine.prepare()
        error = contest.error(mine.run())
        errors[contender.name] = error
        if not error <= contender.tolerance:  # NaN too
            differing.append(contender.name)
    if differing:
        return Outcome(errors, differing)
    for mine in ready[0]:  # once more: the first call compiles, packs or allocates
        mine.prepare()
        mine.run()
    filler.resize(plan.filler_bytes)
    seconds: dict[str, list[float]] = {one.name: [] for one in contest.contenders}
    names = list(seconds)
    for turn in range(num_iters):
        copy = turn % plan.copies
        if copy == 0:
            filler.read()
        for place in range(len(names)):
            index = (turn + place) % len(names)
            if pause_s:
                time.sleep(pause_s)
            seconds[names[index]].append(_time(ready[copy][index]))
    return Outcome(errors, differing, seconds)


def _time(ready: Ready) -> float:
    ready.prepare()
    started = time.perf_counter()
    ready.run()
    return time.perf_counter() - started


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofs:
    """What this machine can do at best."""

    read_bytes_per_s: float
    float32_flops_per_s: float

    @classmethod
    def measure(cls, *, buffer_bytes: int, gemm_size: int) -> Roofs:
        """Raises ConfigError for a buffer too small to time, or too large for the machine."""
        return cls(
            read_bytes_per_s=measure_read_bandwidth(buffer_bytes),
            float32_flops_per_s=measure_gemm(gemm_size),
        )


def measure_gemm(size: int) -> float:
    """Operations per second of a product of two square float32 matrices, the fastest of several.

    Raises:
        ConfigError: more than there is memory for.
    """
    try:
        a, b = torch.ones(size, size), torch.ones(size, size)
        out = torch.empty(size, size)
    except RuntimeError as error:  # what torch raises without memory
        reason = str(error).splitlines()[0]
        raise ConfigError(f"no room for products of --gemm-size {size}: {reason}") from None
    best_s = float("inf")
    for _ in range(_GEMM_PASSES):
        best_s = min(best_s, _time(Ready(lambda: _multiply(a, b, out))))
    return 2 * size**3 / best_s


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out)


def rates(case: Case, seconds: dict[str, list[float]], roofs: Roofs) -> dict[str, Any]:
    """What the report says of times: of the kernel, and of it beside torch's quickest way.

    A rate of arithmetic is None for a kernel that does none.
    """
    medians = {name: median(values) for name, values in seconds.items()}
    kernel_s = medians[KERNEL]
    best = min((name for name in medians if name != KERNEL), key=medians.__getitem__)
    flops_per_s = case.flops / kernel_s if case.flops else None
    bytes_per_s = case.num_bytes / kernel_s
    return {
        "microseconds": {name: 1e6 * value for name, value in medians.items()},
        "fastest_microseconds": {name: 1e6 * min(values) for name, values in seconds.items()},
        "gflop_per_s": None if flops_per_s is None else flops_per_s / 1e9,
        "gb_per_s": bytes_per_s / 1e9,
        "bandwidth_share": bytes_per_s / roofs.read_bytes_per_s,
        "arithmetic_share": (
            None if flops_per_s is None else flops_per_s / roofs.float32_flops_per_s
        ),
        "best_torch": best,
        "ratio": medians[best] / kernel_s,
    }


def geometric_mean(values: list[float]) -> float | None:
    """None of nothing."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None
