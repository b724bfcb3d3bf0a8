"""`momaserve bench serve`: what clients of a server see."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from momaserve.config import SchedulerConfig
from momaserve.environment import machine
from momaserve.errors import ConfigError
from momaserve.training.plot import new_figure
from momaserve_bench.arrivals import arrival_times
from momaserve_bench.engine_setup import load_engine, plain, settings_of
from momaserve_bench.http_cost import check_same_model, http_cost
from momaserve_bench.load import LoadRun, run_load
from momaserve_bench.records import Outcome
from momaserve_bench.report import print_result
from momaserve_bench.serve_metrics import (
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    summarize,
)
from momaserve_bench.serve_report import draw, save, show, show_cost
from momaserve_bench.target import Target, target_of
from momaserve_bench.throughput import one_of_each_kind
from momaserve_bench.workload import Kind, ModelShape, WorkItem, WorkloadSpec

ALL_FAILED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured, checked before anything is started."""

    spec: WorkloadSpec
    arrivals: dict[float, list[float]]
    """By rate: seconds from the start of its run."""
    goodput_ms: dict[str, float]
    percentile_metrics: list[str]
    percents: list[float]

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Plan:
        """Raises ConfigError for values out of their range."""
        for name in ("max_concurrency", "baseline_iters"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        spec = WorkloadSpec.from_args(args)
        return cls(
            spec=spec,
            arrivals={
                rate: arrival_times(
                    spec.num_prompts, rate=rate, burstiness=args.burstiness, seed=spec.seed
                )
                for rate in args.request_rate
            },
            goodput_ms=parse_goodput(args.goodput),
            percentile_metrics=parse_metrics(args.percentile_metrics),
            percents=parse_percentiles(args.metric_percentiles),
        )


def run(args: argparse.Namespace) -> int:
    """Returns 1 when not a single request of any run was answered.

    Raises:
        ConfigError: settings that cannot work.
        TargetError: there is no server to measure.
    """
    plan = Plan.from_args(args)
    if args.plot is not None:
        new_figure()  # better to hear now that nothing can be drawn
    # A server keeps what it computed, also for the next benchmark with the same seed.
    salt = uuid.uuid4().hex
    with target_of(args) as target:
        items = plan.spec.make(ModelShape.from_card(target.card))
        _check_cancels(items, args.partial_images)
        warm = one_of_each_kind(items)
        run_load(target, warm, [0.0] * len(warm), salt=f"{salt}-warm", max_concurrency=1)
        runs = [
            _run_at(rate, target, items, plan, args, f"{salt}-{number}")
            for number, rate in enumerate(plan.arrivals)
        ]
        costs = _cost(target, items, args, salt) if args.offline_baseline else None
    results = [
        {
            "request_rate": plain(rate),
            "burstiness": args.burstiness,
            "max_concurrency": args.max_concurrency,
            **summarize(
                load.records,
                load.duration_s,
                goodput_ms=plan.goodput_ms,
                percentile_metrics=plan.percentile_metrics,
                percents=plan.percents,
            ),
        }
        for rate, load in zip(plan.arrivals, runs, strict=True)
    ]
    show(results, plan.percents)
    report: dict[str, Any] = {**results[0], "results": results}
    if costs is not None:
        show_cost(costs)
        report["http_cost"] = costs
    settings = settings_of(args, target.model)
    records = [load.records for load in runs]
    if args.save_result is not None:
        whole = {"bench": "serve", "settings": settings, "machine": machine(), **report}
        save(args.save_result, whole, records)
    is_answered = any(r.outcome is not Outcome.FAILED for one in records for r in one)
    if args.plot is not None and is_answered:
        draw(results, records, args.plot)
    print_result("serve", settings, report)
    return 0 if is_answered else ALL_FAILED


def _run_at(
    rate: float,
    target: Target,
    items: Sequence[WorkItem],
    plan: Plan,
    args: argparse.Namespace,
    salt: str,
) -> LoadRun:
    return run_load(
        target,
        items,
        plan.arrivals[rate],
        salt=salt,
        max_concurrency=args.max_concurrency,
        partial_images=args.partial_images,
    )


def _check_cancels(items: Sequence[WorkItem], partial_images: int) -> None:
    """Raises ConfigError where a request could not be cancelled half way."""
    for item in items:
        is_hidden = item.kind is Kind.IMAGE_OUTPUT and not item.token_ids and not partial_images
        if item.cancel_share is not None and is_hidden:
            raise ConfigError(
                "--partial-images 0 shows nothing of a picture before it is whole, so that "
                "--cancel-fraction cannot cancel one half way"
            )


def _cost(
    target: Target, items: Sequence[WorkItem], args: argparse.Namespace, salt: str
) -> dict[str, Any]:
    concurrency = args.max_concurrency or SchedulerConfig().max_num_requests
    engine = load_engine(args, num_requests=concurrency)
    check_same_model(engine, target)
    return http_cost(
        target,
        engine,
        items,
        concurrency=concurrency,
        num_iters=args.baseline_iters,
        salt=salt,
    )
