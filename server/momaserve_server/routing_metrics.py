"""Metrics of expert and depth routing, kept as plain sums.

A step adds thousands of (token, layer) observations at once, which a Prometheus histogram
takes one by one; here they stay counts until somebody asks.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from momaserve.stats import StepStats

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTotals:
    """Everything counted so far."""

    num_steps: int
    expert_tokens: dict[tuple[int, str], list[int]]
    """By layer and group: tokens of each expert."""
    group_tokens: dict[tuple[int, str], int]
    """By layer and group: tokens that its router saw."""
    experts_per_token: dict[str, list[int]]
    """By group: (token, layer) pairs with 0, 1, ... experts."""
    depth_tokens: dict[int, tuple[int, int]]
    """By layer: tokens taken and skipped."""


class RoutingCollector(Collector):
    """Owns the sums; written by the engine thread, read by scrapes."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._lock = threading.Lock()
        self._num_steps = 0
        self._expert_tokens: dict[tuple[int, str], list[int]] = {}
        self._group_tokens: defaultdict[tuple[int, str], int] = defaultdict(int)
        self._experts_per_token: dict[str, list[int]] = {}
        self._depth_tokens: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))

    def add(self, stats: StepStats) -> None:
        with self._lock:
            self._num_steps += 1
            for layer, group, counts in stats.expert_tokens:
                _add(self._expert_tokens, (layer, group), counts)
            for layer, group, count in stats.group_tokens:
                self._group_tokens[layer, group] += count
            for group, counts in stats.experts_per_token.items():
                _add(self._experts_per_token, group, counts)
            for layer, taken, skipped in stats.depth_tokens:
                before = self._depth_tokens[layer]
                self._depth_tokens[layer] = (before[0] + taken, before[1] + skipped)

    def totals(self) -> RoutingTotals:
        """All sums as they are between two steps."""
        with self._lock:
            return RoutingTotals(
                num_steps=self._num_steps,
                expert_tokens={key: list(counts) for key, counts in self._expert_tokens.items()},
                group_tokens=dict(self._group_tokens),
                experts_per_token={
                    group: list(counts) for group, counts in self._experts_per_token.items()
                },
                depth_tokens=dict(self._depth_tokens),
            )

    def collect(self) -> Iterator[Metric]:
        totals = self.totals()
        yield self._expert_family(totals.expert_tokens)
        yield from self._per_token_families(totals.experts_per_token)
        yield self._depth_family(totals.depth_tokens)

    def _expert_family(self, sums: dict[tuple[int, str], list[int]]) -> Metric:
        family = CounterMetricFamily(
            self._prefix + "expert_tokens",
            "Tokens that an expert processed.",
            labels=("layer", "group", "expert"),
        )
        for (layer, group), counts in sums.items():
            for expert, count in enumerate(counts):
                family.add_metric((str(layer), group, str(expert)), count)
        return family

    def _per_token_families(self, sums: dict[str, list[int]]) -> Iterator[Metric]:
        histogram = HistogramMetricFamily(
            self._prefix + "experts_per_token",
            "Experts that took a token in one layer.",
            labels=("group",),
        )
        without = CounterMetricFamily(
            self._prefix + "tokens_without_expert",
            "Tokens that no expert took in a layer.",
            labels=("group",),
        )
        for group, counts in sums.items():
            num_tokens = 0
            buckets: list[tuple[str, float]] = []
            for num_experts, count in enumerate(counts):
                num_tokens += count
                buckets.append((str(float(num_experts)), num_tokens))
            buckets.append(("+Inf", num_tokens))
            total = sum(num_experts * count for num_experts, count in enumerate(counts))
            histogram.add_metric((group,), buckets, total)
            without.add_metric((group,), counts[0] if counts else 0)
        yield histogram
        yield without

    def _depth_family(self, sums: dict[int, tuple[int, int]]) -> Metric:
        family = CounterMetricFamily(
            self._prefix + "depth_tokens",
            "Tokens that a depth-routed layer took or let pass.",
            labels=("layer", "taken"),
        )
        for layer, (taken, skipped) in sums.items():
            family.add_metric((str(layer), "true"), taken)
            family.add_metric((str(layer), "false"), skipped)
        return family


def _add(sums: dict[Key, list[int]], key: Key, counts: Sequence[int]) -> None:
    known = sums.get(key)
    sums[key] = (
        list(counts) if known is None else [a + b for a, b in zip(known, counts, strict=True)]
    )
