"""`momaserve bench kernels`: case after case, compared and timed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from momaserve.demo import CHECKPOINT
from momaserve.errors import ConfigError
from momaserve.models.config import ModelConfig
from momaserve.models.presets import preset_config
from momaserve_bench.engine_setup import settings_of
from momaserve_bench.kernels.caches import last_level_bytes
from momaserve_bench.kernels.case import KERNEL, Case, Sizes
from momaserve_bench.kernels.tables import tables_here
from momaserve_bench.kernels.timing import (
    Filler,
    Outcome,
    Roofs,
    geometric_mean,
    hold,
    plan_copies,
    rates,
)
from momaserve_bench.report import check_writable, print_result, print_table
from momaserve_bench.roof import torch_threads

GIB = 1 << 30
DIFFERS = 1
PAUSE_MS = 25.0
"""What torch's OpenMP threads at least need to fall asleep."""


def run(args: argparse.Namespace) -> int:
    """Exit status: 1 if a result differs from what is right.

    Raises:
        ConfigError: a value that cannot work, or no kernels that could run here.
        CheckpointError: a checkpoint without a usable config.json.
    """
    check_arguments(args)
    config, name = _model(args)
    tables = tables_here()
    threads = torch.get_num_threads() if args.threads is None else args.threads
    sizes = Sizes(
        config=config,
        dtype=torch.bfloat16 if args.dtype == "bfloat16" else torch.float32,
        rows=tuple(dict.fromkeys(args.rows)),
        contexts=tuple(dict.fromkeys(args.context)),
        threads=threads,
        seed=args.seed,
    )
    with torch_threads(threads), torch.inference_mode():
        roofs = Roofs.measure(buffer_bytes=int(args.roof_gib * GIB), gemm_size=args.gemm_size)
        print(
            f"roofs: {roofs.read_bytes_per_s / 1e9:.4g} GB/s read, "
            f"{roofs.float32_flops_per_s / 1e9:.4g} GFLOP/s in float32"
        )
        bench = Bench(args, roofs, threads)
        for table in tables:
            for family in dict.fromkeys(args.kernels):
                first = len(bench.results)
                for case in table.cases(family, sizes):
                    bench.measure(table.backend, case)
                show(f"{table.backend}: {family}", bench.results[first:])
    bench.explain()
    if not bench.results and not bench.differing:
        raise ConfigError(
            f"--memory-gib {args.memory_gib:g} is too little for any of these kernels; the first "
            f"needs {bench.skipped[0]['needs_bytes'] / GIB:.3g} GiB"
        )
    settings = settings_of(args, name) | {"threads": threads, "pause_ms": 1e3 * bench.pause_s}
    print_result("kernels", settings, bench.report(), save=args.save_result)
    return DIFFERS if bench.differing else 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ConfigError for numbers out of their range and files that cannot be written."""
    lowest = {"rows": 1, "context": 1, "num_iters": 1, "threads": 1, "gemm_size": 1, "seed": 0}
    for name, low in lowest.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < low:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} must be at least {low}, got {value}")
    for name in ("memory_gib", "roof_gib"):
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if args.pause_ms is not None and not 0 <= args.pause_ms < float("inf"):
        raise ConfigError(f"--pause-ms must be at least 0, got {args.pause_ms}")
    check_writable("--save-result", args.save_result)


def _model(args: argparse.Namespace) -> tuple[ModelConfig, str]:
    if args.preset is not None:
        if args.checkpoint is not None:
            raise ConfigError(f"give CHECKPOINT {args.checkpoint} or --preset, not both")
        return preset_config(args.preset), args.preset
    directory = CHECKPOINT if args.checkpoint is None else args.checkpoint
    return ModelConfig.load(directory), directory.resolve().name


class Bench:
    """Measures cases one by one and keeps what is to be said of them."""

    def __init__(self, args: argparse.Namespace, roofs: Roofs, threads: int) -> None:
        self._args = args
        self._roofs = roofs
        self._cache_bytes = last_level_bytes()
        self._filler = Filler()
        pause_ms = args.pause_ms
        if pause_ms is None:
            pause_ms = PAUSE_MS if threads > 1 else 0.0
        self.pause_s = pause_ms / 1e3
        self.results: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []
        self.differing: list[dict[str, Any]] = []
        self._absent: dict[str, None] = {}

    def measure(self, backend: str, case: Case) -> None:
        args = self._args
        self._absent |= dict.fromkeys(case.absent)
        plan = plan_copies(
            case,
            cache_bytes=self._cache_bytes,
            memory_bytes=int(args.memory_gib * GIB),
            num_iters=args.num_iters,
            is_warm=args.warm_cache,
        )
        entry = {
            "backend": backend,
            "kernel": case.kernel,
            "what": case.what,
            "rows": case.rows,
            "context": case.context,
        }
        if plan is None:
            needed = case.state_bytes + case.held_bytes
            self.skipped.append(entry | {"needs_bytes": needed})
            return
        contest = case.build()
        tolerances = {one.name: one.tolerance for one in contest.contenders}
        outcome = hold(
            contest, plan, num_iters=args.num_iters, filler=self._filler, pause_s=self.pause_s
        )
        entry |= {"errors": outcome.errors, "tolerances": tolerances}
        if outcome.differing:
            self._tell_difference(entry, outcome)
            return
        self.results.append(
            entry
            | {
                "flops": case.flops,
                "bytes": case.num_bytes,
                "state_bytes": case.state_bytes,
                "copies": plan.copies,
                "is_cold": plan.is_cold,
                **rates(case, outcome.seconds, self._roofs),
            }
        )

    def _tell_difference(self, entry: dict[str, Any], outcome: Outcome) -> None:
        # JSON has no infinity and no NaN.
        errors = {name: _plain(error) for name, error in outcome.errors.items()}
        self.differing.append(entry | {"errors": errors, "differing": outcome.differing})

    def explain(self) -> None:
        """What the tables do not say."""
        for name in self._absent:
            print(f"not available here: {name}")
        if self._cache_bytes is None:
            print("the size of the last-level cache is unknown: weights may come from it")
        for one in self.skipped:
            print(
                f"left out: {_title(one)} needs {one['needs_bytes'] / GIB:.3g} GiB for one copy, "
                f"--memory-gib is {self._args.memory_gib:g}"
            )
        for one in self.differing:
            for name in one["differing"]:
                error, tolerance = one["errors"][name], one["tolerances"][name]
                who = one["kernel"] if name == KERNEL else f"{name} beside {one['kernel']}"
                print(f"DIFFERS: {who}, {_title(one)}: by {error}, tolerance {tolerance:g}")

    def report(self) -> dict[str, Any]:
        by_kernel: dict[str, list[float]] = {}
        for one in self.results:
            by_kernel.setdefault(one["kernel"], []).append(one["ratio"])
        return {
            "read_bandwidth_bytes_per_s": self._roofs.read_bytes_per_s,
            "float32_flops_per_s": self._roofs.float32_flops_per_s,
            "last_level_cache_bytes": self._cache_bytes,
            "mean_ratio": {name: geometric_mean(values) for name, values in by_kernel.items()},
            "absent": list(self._absent),
            "skipped": self.skipped,
            "differing": self.differing,
            "results": self.results,
        }


def show(title: str, results: Sequence[dict[str, Any]]) -> None:
    """A family's table; nothing where all of it was left out."""
    if not results:
        return
    print_table(
        f"{title}; medians, ratio: torch's quickest over ours",
        (
            *("kernel", "shape", "rows", "context", "us", "GFLOP/s", "GB/s", "of read", "of gemm"),
            *("weights", "torch's quickest", "us", "ratio"),
        ),
        [
            (
                r["kernel"],
                r["what"],
                r["rows"],
                "-" if r["context"] is None else r["context"],
                r["microseconds"][KERNEL],
                "-" if r["gflop_per_s"] is None else r["gflop_per_s"],
                r["gb_per_s"],
                f"{r['bandwidth_share']:.1%}",
                "-" if r["arithmetic_share"] is None else f"{r['arithmetic_share']:.1%}",
                _temperature(r),
                r["best_torch"],
                r["microseconds"][r["best_torch"]],
                f"{r['ratio']:.2f}",
            )
            for r in results
        ],
    )


def _temperature(result: dict[str, Any]) -> str:
    if not result["state_bytes"]:
        return "-"
    return {True: "cold", False: "warm", None: "?"}[result["is_cold"]]


def _title(entry: dict[str, Any]) -> str:
    context = "" if entry["context"] is None else f", context {entry['context']}"
    return f"{entry['kernel']} ({entry['what']}), {entry['rows']} rows{context}"


def _plain(error: float) -> float | str:
    return error if abs(error) < float("inf") else str(error)
