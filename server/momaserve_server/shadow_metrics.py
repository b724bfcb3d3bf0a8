"""Metrics of shadow evaluation: counters from zero, gauges once there is something to tell."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from momaserve.router_lab.shadow.totals import Findings, Totals
from momaserve_server.shadow_report import agreement, means

MEASURES = ("accuracy", "f1")


class ShadowCollector(Collector):
    """Reads the totals when somebody scrapes. Names are without prefix, as everywhere."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        found = self._totals.findings()
        yield from _plain_counters(found)
        yield from _counters(found)
        yield from self._gauges(found)

    def _gauges(self, found: Findings) -> Iterator[Metric]:
        matches = GaugeMetricFamily(
            "shadow_eval_agreement",
            "How well routers agree with expert choice, over the last tokens scored.",
            labels=("group", "measure"),
        )
        for group in self._totals.kinds:
            values = agreement(found.of_kind(group))
            for measure in MEASURES:
                value = values[measure]
                if value is not None:
                    matches.add_metric((group, measure), value)
        yield matches
        losses = GaugeMetricFamily(
            "shadow_eval_nll",
            "Mean negative log-likelihood of answers' tokens in nat, over the last tokens scored.",
            labels=("modality", "policy"),
        )
        for policy, sums in found.losses.items():
            for modality, mean in means(sums).items():
                if mean is not None:
                    losses.add_metric((modality, policy), mean)
        yield losses


def _plain_counters(found: Findings) -> Iterator[Metric]:
    for name, text, value in (
        ("requests", "Finished requests that were scored.", found.num_requests),
        ("dropped", "Picked requests for which there was no room.", found.num_dropped),
        ("failures", "Batches that could not be scored.", found.num_failed),
    ):
        yield CounterMetricFamily(f"shadow_eval_{name}", text, value=value)


def _counters(found: Findings) -> Iterator[Metric]:
    tokens = CounterMetricFamily(
        "shadow_eval_tokens", "Tokens that were scored, by modality.", labels=("modality",)
    )
    for modality, count in found.tokens.items():
        tokens.add_metric((modality,), count)
    yield tokens
    decisions = CounterMetricFamily(
        "shadow_eval_decisions", "Compared (token, expert) pairs of all layers.", labels=("group",)
    )
    for group, count in found.decisions.items():
        decisions.add_metric((group,), count)
    yield decisions
    flips = CounterMetricFamily(
        "shadow_eval_flips",
        "Decisions that expert choice makes otherwise.",
        labels=("group", "kind"),
    )
    for labels, count in found.flips.items():
        flips.add_metric(labels, count)
    yield flips
