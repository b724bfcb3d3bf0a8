"""`check`: every kernel and whole steps; what differs is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from momaserve_bench.gpu import kernel_checks, step_checks
from momaserve_bench.gpu.device import Budget, Device
from momaserve_bench.gpu.findings import Finding, run_checks
from momaserve_bench.report import print_table


def check(
    device: Device,
    budget: Budget,
    *,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    sizes: kernel_checks.Sizes = kernel_checks.FULL,
    step_sizes: step_checks.StepSizes = step_checks.FULL,
) -> dict[str, Any]:
    """Runs all checks and prints what came of them; `failed` in the result counts those that
    failed."""
    where = device.torch_device
    found = run_checks(kernel_checks.kernel_checks(seed, where, dtype, sizes), budget)
    found += run_checks(step_checks.step_checks(seed, where, step_sizes), budget)
    show(found, seed)
    failed = [one for one in found if not one.passed]
    return {
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "num_checks": len(found),
        "failed": len(failed),
        "findings": [one.to_dict() for one in found],
    }


def show(found: Sequence[Finding], seed: int) -> None:
    """One line for each kernel, its worst comparison; then all that failed."""
    worst: dict[str, Finding] = {}
    for one in found:
        before = worst.get(one.kernel)
        if before is None or _severity(one) > _severity(before):
            worst[one.kernel] = one
    count = {name: sum(one.kernel == name for one in found) for name in worst}
    print_table(
        f"checks, seed {seed}: the worst of each kernel",
        ("kernel", "checks", "error", "tolerance", "", "where"),
        [
            (name, count[name], one.error, one.tolerance, "" if one.passed else "FAILS", one.what)
            for name, one in worst.items()
        ],
    )
    for one in found:
        if not one.passed:
            reason = one.note or f"error {one.error:.4g}, tolerance {one.tolerance:g}"
            print(f"FAILS: {one.kernel} ({one.what}): {reason}")


def _severity(finding: Finding) -> tuple[bool, float]:
    allowed = finding.tolerance or 1.0
    return not finding.passed, finding.error / allowed
