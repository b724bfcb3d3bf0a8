"""One point of `bench scheduling`: both policies on the same requests, and what they differ in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from momaserve.config import Scheduling
from momaserve_bench.report import percentile
from momaserve_bench.scheduling_simulator import Outcome, Served
from momaserve_bench.scheduling_trace import Arrival

Serve = Callable[[Scheduling, Sequence[Arrival]], Outcome]
"""Serves a trace under a policy, on a simulated engine or on a real one."""
MakeTrace = Callable[[float, int], list[Arrival]]
"""Makes a trace from a rate in requests per second and a seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a good answer keeps to."""

    ttft_s: float
    itl_s: float
    """Mean time between its tokens."""

    def are_met(self, served: Served) -> bool:
        times = served.token_times_s
        pace = (times[-1] - times[0]) / max(1, len(times) - 1)
        return times[0] - served.arrival_s <= self.ttft_s and pace <= self.itl_s


def choose_targets(
    saturated: Outcome, answer_tokens: int, ttft_ms: float | None, itl_ms: float | None
) -> Targets:
    """The targets that were asked for; others follow from the mean step of full slots."""
    step_s = saturated.end_s / saturated.num_steps
    return Targets(
        ttft_s=answer_tokens * step_s if ttft_ms is None else ttft_ms / 1000,
        itl_s=1.5 * step_s if itl_ms is None else itl_ms / 1000,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run, in numbers."""

    tokens_per_s: float
    mean_ttft_ms: float
    p50_ttft_ms: float
    p99_ttft_ms: float
    p50_itl_ms: float
    p99_itl_ms: float
    longest_wait_s: float
    """Arrival to the step that a request starts in."""
    most_passes: int
    """Younger requests that started before one, at most."""
    request_goodput: float
    """Requests per second that met the targets."""
    median_error: float
    """Of predicted step times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Both policies at one load, for each seed."""

    load: float
    fcfs: tuple[Summary, ...]
    router_aware: tuple[Summary, ...]

    def ratio(self, name: str) -> float:
        """Router-aware over first come, first served: the geometric mean over seeds."""
        pairs = zip(self.router_aware, self.fcfs, strict=True)
        ratios = [
            max(getattr(aware, name), 1e-12) / max(getattr(first, name), 1e-12)
            for aware, first in pairs
        ]
        return math.exp(statistics.fmean(map(math.log, ratios)))

    def to_dict(self) -> dict[str, object]:
        names = ("tokens_per_s", "mean_ttft_ms", "p50_ttft_ms", "p99_ttft_ms", "p50_itl_ms")
        return {
            "load": self.load,
            "ratios": {n: self.ratio(n) for n in (*names, "p99_itl_ms", "request_goodput")},
            "lowest_tokens_per_s_ratio": min(
                aware.tokens_per_s / first.tokens_per_s
                for aware, first in zip(self.router_aware, self.fcfs, strict=True)
            ),
            "fcfs": [asdict(summary) for summary in self.fcfs],
            "router_aware": [asdict(summary) for summary in self.router_aware],
        }


def summarise(outcome: Outcome, targets: Targets) -> Summary:
    """The numbers of a run."""
    served = outcome.served
    ttft_ms = [1000 * (s.token_times_s[0] - s.arrival_s) for s in served]
    itl_ms = [
        1000 * (later - sooner)
        for s in served
        for sooner, later in zip(s.token_times_s, s.token_times_s[1:], strict=False)
    ]
    return Summary(
        tokens_per_s=outcome.tokens_per_s,
        mean_ttft_ms=statistics.fmean(ttft_ms),
        p50_ttft_ms=percentile(ttft_ms, 0.5),
        p99_ttft_ms=percentile(ttft_ms, 0.99),
        p50_itl_ms=percentile(itl_ms, 0.5),
        p99_itl_ms=percentile(itl_ms, 0.99),
        longest_wait_s=max(s.start_s - s.arrival_s for s in served),
        most_passes=max(s.num_passes for s in served),
        request_goodput=sum(map(targets.are_met, served)) / outcome.end_s,
        median_error=outcome.median_error,
    )


def measure(
    serve: Serve,
    make_trace: MakeTrace,
    targets_for: Callable[[Outcome], Targets],
    *,
    loads: Sequence[float],
    seeds: Sequence[int],
) -> list[Point]:
    """Both policies at each load, offered over what first come, first served can serve.

    Its capacity is measured with all requests there at once, for each seed, and `targets_for`
    is given what came of that.
    """
    saturated = {seed: serve(Scheduling.FCFS, make_trace(math.inf, seed)) for seed in seeds}
    points: list[Point] = []
    for load in loads:
        runs: dict[Scheduling, list[Summary]] = {policy: [] for policy in Scheduling}
        for seed in seeds:
            trace = make_trace(load * saturated[seed].requests_per_s, seed)
            targets = targets_for(saturated[seed])
            for policy in Scheduling:
                runs[policy].append(summarise(serve(policy, trace), targets))
        points.append(
            Point(
                load=load,
                fcfs=tuple(runs[Scheduling.FCFS]),
                router_aware=tuple(runs[Scheduling.ROUTER_AWARE]),
            )
        )
    return points
