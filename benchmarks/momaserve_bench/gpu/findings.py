"""What comes of comparing a result with what it should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momaserve_bench.gpu.device import Budget, Device

TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of an error as `error_of` has it. Twins get the same inputs and compute in float32, so what is
left is rounding: half a unit in the last place (2^-9 in bfloat16, 2^-12 in float16) where a result
is stored, and as much where a kernel feeds one product with another's result. float32 is 500 of its
units: sums of thousands of products in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One comparison."""

    kernel: str
    what: str
    error: float
    tolerance: float
    note: str = ""
    """Why there is nothing to compare, where something went wrong."""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # not of NaN

    def told(self) -> str:
        """A failure as a line."""
        reason = self.note or f"error {self.error:.4g}, tolerance {self.tolerance:g}"
        return f"FAILS: {self.kernel} ({self.what}): {reason}"

    def to_dict(self) -> dict[str, Any]:
        error = self.error if math.isfinite(self.error) else str(self.error)  # JSON has no more
        return {
            "kernel": self.kernel,
            "what": self.what,
            "error": error,
            "tolerance": self.tolerance,
            "passed": self.passed,
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class Check:
    """A comparison that is still to be made."""

    kernel: str
    what: str
    tolerance: float
    error: Callable[[], float]


def run_checks(
    checks: Iterable[Check],
    device: Device,
    budget: Budget,
    keep: Callable[[list[Finding]], None] = lambda _: None,
) -> list[Finding]:
    """Makes the comparisons one after another. What raises has failed, and the others go on; so
    have those for which no time was left, and those after which nothing runs on the device any
    more, for nobody knows. Tells of each kernel as it begins, so that one which never ends is
    known, and of each failure at once.

    Args:
        keep: is given what there is at the end of each kernel.
    """
    found: list[Finding] = []
    why_not = ""
    for check in checks:
        if not found or found[-1].kernel != check.kernel:
            keep(found)
            print(f"checking {check.kernel}", flush=True)
        if budget.is_spent:
            why_not = why_not or f"left out: the {budget.limit_s:g} s of this call were over"
        one = _finding(check, why_not)
        found.append(one)
        if one.passed or why_not:
            continue
        print(one.told(), flush=True)
        try:
            device.synchronize()
        except Exception as failure:
            why_not = f"left out: the device is beyond use after a failure: {line_of(failure)}"
    return found


@torch.inference_mode()
def _finding(check: Check, why_not: str) -> Finding:
    """Args: why_not: a reason to leave it out."""
    error, note = math.inf, why_not
    if not why_not:
        try:
            error = check.error()
        except Exception as failure:
            note = line_of(failure)
    return Finding(
        kernel=check.kernel, what=check.what, error=error, tolerance=check.tolerance, note=note
    )


def line_of(failure: Exception) -> str:
    """What went wrong, in one line."""
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0]}"


def error_of(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value that was wanted; infinite where shapes differ
    or `got` is not finite. Of nothing it is 0."""
    if got.shape != wanted.shape or not bool(torch.isfinite(got).all()):
        return math.inf
    if not wanted.numel():
        return 0.0
    wide = wanted.double()
    largest = float(wide.abs().max())
    difference = float((got.double() - wide).abs().max())
    return difference / largest if largest else difference


def num_differing(got: Tensor, wanted: Tensor) -> float:
    """Entries that are not equal, for results that must be; infinite where shapes differ."""
    if got.shape != wanted.shape:
        return math.inf
    return float((got != wanted).sum())
