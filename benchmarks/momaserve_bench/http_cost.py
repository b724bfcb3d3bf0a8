"""What HTTP costs: the same requests through a server and without one, in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve_bench.load import run_load
from momaserve_bench.offline import run_offline
from momaserve_bench.records import Outcome
from momaserve_bench.serve_metrics import failures
from momaserve_bench.target import Target, TargetError
from momaserve_bench.workload import Kind, ModelShape, WorkItem

PARTS = {
    "pictures": (Kind.IMAGE_OUTPUT,),
    "text_streams": (Kind.TEXT, Kind.IMAGE_INPUT),
}
"""Pictures are sent whole, in one event; words token by token."""


def check_same_model(engine: Engine, target: Target) -> None:
    """Raises ConfigError where the engine has another model than the server."""
    here, there = ModelShape.from_engine(engine), ModelShape.from_card(target.card)
    groups = [
        {
            "name": g.name,
            "modalities": [m.label for m in g.modalities],
            "num_experts": g.num_experts,
        }
        for g in engine.model_config.expert_groups
    ]
    if here != there or groups != target.card["expert_groups"]:
        raise ConfigError(
            f"--offline-baseline: {engine.model_name} is not what {target.url} serves as "
            f"{target.model}: name the same CHECKPOINT or --preset, and --max-model-len"
        )


def http_cost(
    target: Target,
    engine: Engine,
    items: Sequence[WorkItem],
    *,
    concurrency: int,
    num_iters: int,
    salt: str,
) -> dict[str, Any]:
    """Medians of both sides for each of PARTS that `items` have, and the extra time in percent.

    All requests are due at once and `concurrency` of them under way, on both sides. The sides
    take turns, so that a machine that slows down slows both. Probes are left out, and requests
    that were to be cancelled are not.

    Raises:
        TargetError: a request failed, so that the sides did not do the same.
    """
    costs: dict[str, Any] = {}
    for part, kinds in PARTS.items():
        chosen = [replace(item, cancel_share=None) for item in items if item.kind in kinds]
        if not chosen:
            continue
        over_http, offline = _sides(target, engine, chosen, concurrency)
        over_http(f"{salt}-{part}-warm")
        offline(f"{salt}-{part}-warm")
        times = [
            (over_http(f"{salt}-{part}-{number}"), offline(f"{salt}-{part}-{number}"))
            for number in range(num_iters)
        ]
        http_s, offline_s = (median(side) for side in zip(*times, strict=True))
        costs[part] = {
            "num_requests": len(chosen),
            "concurrency": concurrency,
            "http_s": http_s,
            "offline_s": offline_s,
            "cost_percent": 100 * (http_s / offline_s - 1),
        }
    return costs


def _sides(
    target: Target, engine: Engine, items: Sequence[WorkItem], concurrency: int
) -> tuple[Callable[[str], float], Callable[[str], float]]:
    """Runs of either side: from a salt to seconds."""

    def over_http(salt: str) -> float:
        due = [0.0] * len(items)
        run = run_load(target, items, due, salt=salt, max_concurrency=concurrency)
        if any(record.outcome is not Outcome.COMPLETED for record in run.records):
            first = failures(run.records)[0]
            raise TargetError(f"--offline-baseline: {first['reason']}: {first['example']}")
        return run.duration_s

    def offline(salt: str) -> float:
        return run_offline(engine, items, concurrency=concurrency, salt=salt).elapsed_s

    return over_http, offline
