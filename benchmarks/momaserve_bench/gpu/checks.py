"""`check`: every kernel and whole steps; what differs is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from momaserve.errors import ConfigError
from momaserve_bench.gpu import kernel_checks, step_checks
from momaserve_bench.gpu.device import Budget, Device
from momaserve_bench.gpu.findings import Finding, run_checks
from momaserve_bench.report import print_table


def check(
    device: Device,
    budget: Budget,
    *,
    seed: int,
    only: str = "",
    dtype: torch.dtype = torch.bfloat16,
    sizes: kernel_checks.Sizes = kernel_checks.FULL,
    step_sizes: step_checks.StepSizes = step_checks.FULL,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Runs the checks, whole steps first, and prints what came of them; `failed` in the result
    counts those that failed.

    Args:
        only: a part of the names of kernels that are checked.
        keep: is given what there is at the end of each kernel.

    Raises:
        ConfigError: no kernel has such a name.
    """
    where = device.torch_device
    every = chain(
        step_checks.step_checks(seed, where, step_sizes),
        kernel_checks.kernel_checks(seed, where, dtype, sizes),
    )
    wanted = (one for one in every if only in one.kernel)
    found = run_checks(
        wanted, device, budget, lambda findings: keep(_report(findings, seed, dtype))
    )
    if not found:
        raise ConfigError(f"--only {only!r} is in no kernel's name")
    show(found, seed)
    return _report(found, seed, dtype)


def _report(found: Sequence[Finding], seed: int, dtype: torch.dtype) -> dict[str, Any]:
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
            print(one.told())


def _severity(finding: Finding) -> tuple[bool, float]:
    allowed = finding.tolerance or 1.0
    return not finding.passed, finding.error / allowed
