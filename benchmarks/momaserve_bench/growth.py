"""`momaserve bench growth`: how time and memory grow with requests, prompts and contexts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve.training.plot import new_figure
from momaserve_bench.engine_setup import load_engine, settings_of
from momaserve_bench.growth_curve import TOLERANCE, Curve, doublings
from momaserve_bench.growth_measure import GrowthBench
from momaserve_bench.growth_plot import draw
from momaserve_bench.report import check_writable, print_result, print_table

SHORTEST = 128
FEWEST_HELD = 256
MOST_HELD = 16384
_MIB = 1 << 20


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for settings that cannot work, CheckpointError for a broken model."""
    check_arguments(args)
    engine = load_engine(args, num_requests=max(args.concurrency))
    lengths = checked_lengths("--input-len", args.input_len, engine, 1)
    contexts = checked_lengths("--context", args.context, engine, args.output_len)
    checked_lengths("--prompt-len", [args.prompt_len], engine, args.output_len)
    bench = GrowthBench(engine, num_iters=args.num_iters, seed=args.seed)
    counts = sorted(set(args.concurrency))
    for count in counts:
        bench.check_concurrency(count, args.prompt_len + args.output_len)
    held = checked_held(bench, args.held_tokens)
    kv_memory, process, base = bench.memory(held)
    throughput = bench.throughput(counts, args.prompt_len, args.output_len)
    first_token = bench.first_tokens(lengths)
    decoding = bench.decoding(contexts, args.output_len)
    curves = (throughput, first_token, decoding, kv_memory, process)
    for curve in curves[:3]:
        show(curve)
    show_memory(kv_memory, process, base)
    marked = {curve.name: curve.marked for curve in curves if curve.marked}
    for name, places in marked.items():
        print(f"super-linear, to be explained: {name} at {', '.join(f'{x:g}' for x in places)}")
    if args.plot is not None:
        draw(throughput, first_token, decoding, (kv_memory, process), args.plot)
    settings = settings_of(args, engine.model_name)
    settings |= {
        "dtype": str(engine.dtype).split(".")[-1],
        "backend": engine.backend_name,
        "input_len": lengths,
        "context": contexts,
        "held_tokens": held,
    }
    report: dict[str, Any] = {
        "curves": {curve.name: curve.to_dict() for curve in curves},
        "nothing_held": base,
        "super_linear": marked,
    }
    print_result("growth", settings, report, save=args.save_result)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ConfigError for numbers out of their range and files that cannot be written."""
    lowest = {
        "concurrency": 1,
        "input_len": 1,
        "context": 1,
        "held_tokens": 1,
        "prompt_len": 1,
        "output_len": 2,
        "num_iters": 1,
        "seed": 0,
    }
    for name, low in lowest.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < low:
                reason = ", for decoding begins after the first token" if low == 2 else ""
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} must be at least {low}{reason}, got {value}")
    if args.plot is not None:
        new_figure()  # better to hear now that nothing can be drawn
    check_writable("--plot", args.plot)
    check_writable("--save-result", args.save_result)


def checked_lengths(flag: str, wanted: list[int] | None, engine: Engine, room: int) -> list[int]:
    """Lengths by rising size; the default ones where none are wanted.

    Args:
        room: tokens that must have room behind each.

    Raises:
        ConfigError: a length that leaves less.
    """
    limit = engine.max_model_len - room
    if limit < 1:
        raise ConfigError(
            f"--output-len {room} leaves no room for a prompt: requests have at most "
            f"{engine.max_model_len} tokens"
        )
    if wanted is None:
        return doublings(SHORTEST, limit, with_last=True)
    for length in wanted:
        if length > limit:
            raise ConfigError(
                f"{flag} {length} is more than {limit}: requests have at most "
                f"{engine.max_model_len} tokens (max_model_len), and {room} of them come behind it"
            )
    return sorted(set(wanted))


def checked_held(bench: GrowthBench, wanted: list[int] | None) -> list[int]:
    """Tokens to hold by rising number; where none are wanted, as many as there is room for.

    Raises:
        ConfigError: there is no room for those that are wanted.
    """
    held = doublings(FEWEST_HELD, MOST_HELD) if wanted is None else sorted(set(wanted))
    while True:
        try:
            bench.check_held(held)
            return held
        except ConfigError:
            if wanted is not None or len(held) == 1:
                raise
            held.pop()


def show(curve: Curve) -> None:
    """A curve's table for people."""
    print_table(
        f"{curve.name.replace('_', ' ')}: {_expectation(curve)}",
        (curve.x_name, curve.y_name, "exponent", ""),
        [(f"{p.x:g}", p.y, _cell(p.exponent), _mark(p.is_super_linear)) for p in curve.points],
    )


def show_memory(kv_memory: Curve, process: Curve, base: dict[str, Any]) -> None:
    """Both curves of memory in one table."""
    rows: list[Sequence[object]] = [
        ("0", 0.0, "-", "", base["resident_bytes"] / _MIB, 0.0, "-", "")
    ]
    for blocks, whole in zip(kv_memory.points, process.points, strict=True):
        rows.append(
            (
                f"{blocks.x:g}",
                blocks.y / _MIB,
                _cell(blocks.exponent),
                _mark(blocks.is_super_linear),
                whole.y / _MIB,
                (whole.y - base["resident_bytes"]) / _MIB,
                _cell(whole.exponent),
                _mark(whole.is_super_linear),
            )
        )
    print_table(
        f"memory: {_expectation(kv_memory)}; {base['kv_bytes_of_all_blocks'] / _MIB:.4g} MiB for "
        f"all KV blocks; of the process: {base['resident_source']}",
        ("tokens held", "KV MiB", "exponent", "", "process MiB", "grown by", "exponent", ""),
        rows,
    )


def _expectation(curve: Curve) -> str:
    if curve.highest is not None:
        return f"exponent expected to be at most {curve.highest:g}, marked beyond {TOLERANCE} more"
    return f"exponent expected to be at least {curve.lowest:g}, marked beyond {TOLERANCE} less"


def _cell(exponent: float | None) -> str:
    return "-" if exponent is None else f"{exponent:.2f}"


def _mark(is_super_linear: bool) -> str:
    return "super-linear" if is_super_linear else ""
