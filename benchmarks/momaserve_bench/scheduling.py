"""`momaserve bench scheduling`: router-aware scheduling against first come, first served."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from momaserve.config import Scheduling
from momaserve.core.cost_model import MachineRates
from momaserve.core.model_costs import ModelCosts, model_costs
from momaserve.errors import ConfigError
from momaserve.models.presets import preset_config
from momaserve.tokens.grammar import GrammarSpec
from momaserve.training.plot import new_figure
from momaserve_bench.engine_setup import with_image_tokens
from momaserve_bench.report import print_result, print_table
from momaserve_bench.scheduling_confirm import confirm, scheduler_config
from momaserve_bench.scheduling_plot import plot
from momaserve_bench.scheduling_point import Point, Summary, Targets, choose_targets, measure
from momaserve_bench.scheduling_simulator import Machine, Outcome, Simulation
from momaserve_bench.scheduling_trace import Arrival, make_trace

_RATES = {
    "cpu": MachineRates(bytes_per_s=23e9, flops_per_s=150e9, fixed_s=1e-3),
    "h200": MachineRates(bytes_per_s=4.3e12, flops_per_s=700e12, fixed_s=0.3e-3),
}
_WEIGHT_BYTES = 2
"""Of a number in bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model on a machine with so many slots."""

    size: str
    machine: str
    num_slots: int


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError for counts that are not positive, or shares out of range."""
    _check(args)
    figure = None if args.plot is None else new_figure()
    results: list[tuple[Setting, Point]] = []
    for size in args.sizes:
        config = with_image_tokens(preset_config(f"moma-{size}-4t4i"), args.image_tokens)
        spec = GrammarSpec.from_config(config)
        costs = model_costs(config, _WEIGHT_BYTES)
        for name in args.machines:
            for slots in args.slots:
                setting = Setting(size=size, machine=name, num_slots=slots)
                points = _simulate(setting, costs, spec, args)
                results += [(setting, point) for point in points]
    _print(results)
    metrics: dict[str, Any] = {"points": [_entry(*result) for result in results]}
    metrics["lowest_ratio"] = min(p["lowest_tokens_per_s_ratio"] for p in metrics["points"])
    if args.confirm:
        metrics["confirmed"] = confirm(args)
    if figure is not None:
        names = [f"{s.size} {s.machine}, {s.num_slots} slots, load {p.load}" for s, p in results]
        plot(figure, names, [point.ratio("tokens_per_s") for _, point in results], args.plot)
    hidden = ("bench", "plot", "save_result")
    settings = {key: value for key, value in vars(args).items() if key not in hidden}
    print_result("scheduling", settings, metrics, save=args.save_result)
    return 0


def _check(args: argparse.Namespace) -> None:
    positive = ("slots", "loads", "num_requests", "prompt_tokens", "image_tokens", "belief")
    for name in (*positive, "max_num_step_tokens", "ttft_target_ms", "itl_target_ms"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if not 0 <= args.noise <= 1:
        raise ConfigError(f"--noise must be between 0 and 1, got {args.noise}")
    if args.num_requests < 2:
        raise ConfigError(
            f"--num-requests must be at least 2, one of each kind, got {args.num_requests}"
        )


def _simulate(
    setting: Setting, costs: ModelCosts, spec: GrammarSpec, args: argparse.Namespace
) -> list[Point]:
    machine = Machine(rates=_RATES[setting.machine], noise=args.noise, belief=args.belief)

    def trace(rate_per_s: float, seed: int) -> list[Arrival]:
        return make_trace(
            spec,
            num_requests=args.num_requests,
            prompt_tokens=args.prompt_tokens,
            rate_per_s=rate_per_s,
            seed=seed,
        )

    def serve(policy: Scheduling, arrivals: Sequence[Arrival]) -> Outcome:
        config = scheduler_config(policy, setting.num_slots, args)
        return Simulation(costs, spec, machine, config, seed=len(arrivals)).run(arrivals)

    def targets(saturated: Outcome) -> Targets:
        return choose_targets(saturated, args.image_tokens, args.ttft_target_ms, args.itl_target_ms)

    return measure(serve, trace, targets, loads=args.loads, seeds=args.seeds)


def _mean(summaries: Sequence[Summary], name: str) -> float:
    return statistics.fmean(getattr(summary, name) for summary in summaries)


def _entry(setting: Setting, point: Point) -> dict[str, Any]:
    return {
        "preset": f"moma-{setting.size}-4t4i",
        "machine": setting.machine,
        "slots": setting.num_slots,
        **point.to_dict(),
    }


def _print(results: Sequence[tuple[Setting, Point]]) -> None:
    header = (
        *("preset", "machine", "slots", "load", "tokens/s", "ratio", "mean TTFT", "p99 TTFT"),
        *("p50 ITL", "p99 ITL", "goodput", "longest wait s", "passes", "error"),
    )
    rows = []
    for setting, point in results:
        aware, first = point.router_aware, point.fcfs
        rows.append(
            (
                setting.size,
                setting.machine,
                setting.num_slots,
                point.load,
                _mean(aware, "tokens_per_s"),
                f"{point.ratio('tokens_per_s'):.3f}",
                *(
                    f"{point.ratio(name):.2f}"
                    for name in ("mean_ttft_ms", "p99_ttft_ms", "p50_itl_ms", "p99_itl_ms")
                ),
                f"{_mean(first, 'request_goodput'):.3g} -> {_mean(aware, 'request_goodput'):.3g}",
                f"{max(s.longest_wait_s for s in first):.3g} -> "
                f"{max(s.longest_wait_s for s in aware):.3g}",
                max(s.most_passes for s in aware),
                f"{max(s.median_error for s in aware):.3f}",
            )
        )
    print_table(
        "Router-aware over first come, first served: ratios are geometric means over seeds",
        header,
        rows,
    )
