"""Whatever deploy/ says of metrics is what the server really shows."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.deploy.files import (
    DEPLOY,
    dashboard,
    exported,
    mentioned,
    panels,
    rules,
    without_variables,
)

NOT_METRICS = {"momaserve_server", "momaserve_client", "momaserve_bench"}
OTHERS = {"up", "ALERTS", "probe_success"}
"""Metrics of Prometheus itself and of the blackbox exporter."""
ENDINGS = ("_bucket", "_sum", "_count", "_total")


def expressions() -> Iterator[tuple[str, str]]:
    """(where it stands, expression)."""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], without_variables(target["expr"])
    for annotation in dashboard()["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["name"], annotation["expr"]


EXPRESSIONS = list(expressions())


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[w for w, _ in EXPRESSIONS])
def test_an_expression_asks_for_metrics_and_labels_that_exist(where: str, expression: str) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for name, equal in mentioned(expression).selectors:
        if name in OTHERS or name in recorded:
            continue
        assert name in exported(), f"{where}: no metric {name}"
        for label, value in equal.items():
            values = exported()[name].get(label)
            assert values is not None, f"{where}: {name} has no label {label}"
            assert value in values, f"{where}: {name} never has {label}={value!r}"


def test_every_recorded_metric_is_used() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for _, expression in EXPRESSIONS for name in mentioned(expression).names}
    assert recorded <= used


def test_metrics_named_in_any_file_exist() -> None:
    families = {name.removesuffix(ending) for name in exported() for ending in (*ENDINGS, "")}
    named = re.compile(r"(?<![:\w.-])momaserve_[a-z0-9_]+")
    for path in sorted(p for p in DEPLOY.rglob("*") if p.is_file() and not p.is_symlink()):
        if path.suffix == ".pyc":
            continue
        found = set(named.findall(path.read_text(encoding="utf-8"))) - NOT_METRICS
        assert found <= set(exported()) | families, path


def test_the_parser_refuses_what_is_not_promql() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        mentioned("sum by (job (momaserve_num_requests_waiting)")
