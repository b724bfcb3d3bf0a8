"""What the tests of `deploy/` read, and what PromQL expressions mention."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import promql_parser
import yaml
from prometheus_client.parser import text_string_to_metric_families

from momaserve.outputs import FinishReason
from momaserve_server.metrics import ServerMetrics
from tests.server.fake_engine import FakeAsyncEngine
from tests.server.test_metrics import STEP, request_stats

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "momaserve"
RULE_FILES = (DEPLOY / "prometheus" / "recording.yml", DEPLOY / "prometheus" / "alerts.yml")
DASHBOARD = DEPLOY / "grafana" / "momaserve.json"


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@cache
def dashboard() -> dict[str, Any]:
    board: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return board


def panels() -> list[dict[str, Any]]:
    """Without rows, which only have a title."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> Iterator[dict[str, Any]]:
    for path in RULE_FILES:
        for group in load_yaml(path)["groups"]:
            yield from group["rules"]


@cache
def exported() -> dict[str, dict[str, set[str]]]:
    """What `/metrics` shows: sample name -> label name -> values seen."""
    metrics = ServerMetrics()
    metrics.on_step(STEP)
    for reason in FinishReason:
        metrics.on_finished(request_stats(reason))
    metrics.on_rejected("queue_full")
    metrics.on_aborted("drain")
    text = metrics.render(FakeAsyncEngine().as_engine()).decode()
    found: dict[str, dict[str, set[str]]] = {}
    families = text_string_to_metric_families(text)
    for sample in (sample for family in families for sample in family.samples):
        labels = found.setdefault(sample.name, defaultdict(set))
        for name, value in sample.labels.items():
            labels[name].add(value)
    return found


@dataclass(slots=True)
class Mentioned:
    """The metrics of an expression."""

    selectors: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """(name, values of labels that are compared with =)."""

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self.selectors}


def mentioned(expression: str) -> Mentioned:
    """Parses an expression; raises ValueError where it is not PromQL."""
    found = Mentioned()

    def look(node: Any) -> None:
        if not isinstance(node, promql_parser.VectorSelector):
            return
        equal = {
            matcher.name: matcher.value
            for matcher in node.matchers.matchers
            if matcher.op == promql_parser.MatchOp.Equal
        }
        found.selectors.append((node.name or "", equal))

    promql_parser.walk(promql_parser.parse(expression), look)
    return found


def without_variables(expression: str) -> str:
    """A dashboard's expression as Grafana would send it."""
    return expression.replace("$__rate_interval", "5m")
