"""`python -m momaserve_bench.gpu check|time|peers|tune|all`: what `benchmarks/gpu.sh` runs."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from momaserve.environment import machine
from momaserve.errors import ConfigError
from momaserve_bench.gpu.device import Budget, CudaDevice, Device
from momaserve_bench.report import print_result

PARTS = ("check", "time", "peers")
"""What `all` runs."""
LIMIT_S = 500.0
"""Within which a call begins what it does."""
_PACKAGES = ("triton", "transformers", "numpy", "safetensors", "tokenizers")
Keep = Callable[[dict[str, Any]], None]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="gpu.sh",
        description="Checks the Triton backend on a GPU, times it, and compares it with a peer.",
    )
    made.add_argument(
        "part", nargs="?", choices=(*PARTS, "tune", "all"), default="all", help="(default: all)"
    )
    made.add_argument("--seed", type=int, help="of all random numbers (default: from the clock)")
    made.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        metavar="DIR",
        help="where gpu-PART.json goes (default: benchmarks/results)",
    )
    made.add_argument(
        "--limit",
        type=float,
        default=LIMIT_S,
        metavar="S",
        help=f"seconds after which a part begins nothing new (default: {LIMIT_S:g})",
    )
    made.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="check: only kernels that have this in their name (default: all of them)",
    )
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 1 where a check or a measurement failed, or where there is no GPU."""
    args = parser().parse_args(words)
    try:
        device = CudaDevice()
        check_arguments(args)
        return run(args, device, PART_RUNNERS | {"check": partial(_check, only=args.only)})
    except ConfigError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        return 1


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ConfigError for numbers out of their range and a folder that cannot be made."""
    if args.seed is None:
        args.seed = time.time_ns() % (1 << 31)
    if not 0 <= args.seed < 1 << 31:
        raise ConfigError(f"--seed must be from 0 to {(1 << 31) - 1}, got {args.seed}")
    if args.only and args.part != "check":
        raise ConfigError(f"--only {args.only!r} is for check, not for {args.part}")
    if not 0 < args.limit < float("inf"):
        raise ConfigError(f"--limit must be above 0 seconds, got {args.limit:g}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {args.out} cannot be made: {error}") from None


def run(
    args: argparse.Namespace,
    device: Device,
    runners: dict[str, Callable[[Device, Budget, int, Keep], dict[str, Any]]],
) -> int:
    """Runs the parts asked for; the last line is the JSON of all, each also has a file."""
    parts = PARTS if args.part == "all" else (args.part,)
    settings = _settings(args, device)
    print(f"{settings['device']['name']}, seed {args.seed}: {settings['command']}")
    done: dict[str, dict[str, Any]] = {}
    here = machine()
    for part in parts:
        kept: dict[str, Any] = {}
        path = args.out / f"gpu-{part}.json"

        def keep(
            found: dict[str, Any],
            part: str = part,
            path: Path = path,
            kept: dict[str, Any] = kept,
        ) -> None:
            kept.update(found)
            line = {"bench": "gpu", "settings": settings, "machine": here, part: found}
            path.write_text(json.dumps(line) + "\n", encoding="utf-8")

        started = device.now()
        try:
            found = runners[part](device, Budget(device, args.limit), args.seed, keep)
        except Exception as error:  # after a device error nothing runs, but what is there is told
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}"
            found = kept | {"failures": kept.get("failures", {}) | {part: reason}}
            print(f"FAILS: {part}: {reason}")
        found["seconds"] = device.now() - started
        done[part] = found
        keep(found)
    print_result("gpu", settings, done)
    return 1 if any(map(has_failed, done.values())) else 0


def has_failed(found: dict[str, Any]) -> bool:
    """Whether a check, a section or a run of ours failed."""
    return bool(found.get("failed") or found.get("failures"))


def _settings(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "part": args.part,
        "seed": args.seed,
        "limit_s": args.limit,
        "command": shlex.join(["benchmarks/gpu.sh", *sys.argv[1:]]),
        "device": device.describe(),
        "versions": versions,
    }


def _check(device: Device, budget: Budget, seed: int, keep: Keep, only: str = "") -> dict[str, Any]:
    found: dict[str, Any] = _module("checks").check(device, budget, seed=seed, only=only, keep=keep)
    return found


def _time(device: Device, budget: Budget, seed: int, keep: Keep) -> dict[str, Any]:
    found: dict[str, Any] = _module("timing").time_all(device, budget, seed=seed, keep=keep)
    return found


def _peers(device: Device, budget: Budget, seed: int, keep: Keep) -> dict[str, Any]:
    found: dict[str, Any] = _module("peers").compare(device, budget, seed=seed, keep=keep)
    return found


def _tune(device: Device, budget: Budget, seed: int, keep: Keep) -> dict[str, Any]:
    found: dict[str, Any] = _module("tuning").tune(device, budget, seed=seed, keep=keep)
    return found


def _module(name: str) -> Any:
    """Found when it is needed: without a GPU there may be no Triton either."""
    return importlib.import_module(f"momaserve_bench.gpu.{name}")


PART_RUNNERS: dict[str, Callable[[Device, Budget, int, Keep], dict[str, Any]]] = {
    "check": _check,
    "time": _time,
    "peers": _peers,
    "tune": _tune,
}

if __name__ == "__main__":
    sys.exit(main())
