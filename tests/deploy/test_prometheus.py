"""Rules and scrape configuration. What the rules do, promtool tests (deploy/prometheus/tests)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from momaserve_server.metrics import FAST_S
from tests.deploy.files import DEPLOY, load_yaml, mentioned, rules

PROMETHEUS = DEPLOY / "prometheus"
ALERTS = [rule for rule in rules() if "alert" in rule]
PROMTOOL = shutil.which("promtool")


def jobs() -> dict[str, Any]:
    config = load_yaml(PROMETHEUS / "prometheus.yml")
    return {job["job_name"]: job for job in config["scrape_configs"]}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_it_means_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("Momaserve")
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    for name, text in rule["annotations"].items():
        assert text.strip() == text, name
        assert text.count("{{") == text.count("}}"), name
    assert len(rule["annotations"]["runbook"]) > 100


def test_one_alert_fires_once_at_each_severity() -> None:
    told_apart = [(rule["alert"], *sorted(rule["labels"].items())) for rule in ALERTS]
    assert len(told_apart) == len(set(told_apart))


def test_group_names_are_unique_over_all_files() -> None:
    """The chart puts them all into one PrometheusRule."""
    groups = [
        group["name"]
        for name in ("recording.yml", "alerts.yml")
        for group in load_yaml(PROMETHEUS / name)["groups"]
    ]
    assert len(groups) == len(set(groups))


def test_jobs_that_alerts_name_are_scraped() -> None:
    named = {
        equal["job"]
        for rule in ALERTS
        for _, equal in mentioned(rule["expr"]).selectors
        if "job" in equal
    }
    assert named == {"momaserve", "momaserve-health", "momaserve-ready"}
    assert named <= set(jobs())


def test_probes_ask_the_routes_that_tell_about_progress_and_readiness() -> None:
    modules = load_yaml(PROMETHEUS / "blackbox.yml")["modules"]
    for job, path in (("momaserve-health", "/health"), ("momaserve-ready", "/ready")):
        probe = jobs()[job]
        assert [url for part in probe["static_configs"] for url in part["targets"]] == [
            f"http://momaserve:8000{path}"
        ]
        assert set(probe["params"]["module"]) <= set(modules)
    assert modules["http_200"]["http"]["valid_status_codes"] == [200]


def test_the_objectives_in_texts_are_those_in_expressions() -> None:
    buckets = {
        "MomaserveSlowFirstToken": ("2.5", "momaserve_ttft_slow"),
        "MomaserveSlowTokens": ("0.2", "momaserve_itl_slow"),
    }
    for alert, (objective_s, record) in buckets.items():
        bounds = {
            equal["le"]
            for rule in rules()
            if record in rule.get("record", "")
            for _, equal in mentioned(rule["expr"]).selectors
            if "le" in equal
        }
        assert bounds == {objective_s}
        texts = [rule["annotations"]["description"] for rule in ALERTS if rule["alert"] == alert]
        assert texts and all(f"{objective_s} s" in text for text in texts)
    assert 0.2 in FAST_S


def test_every_alert_has_a_unit_test() -> None:
    texts = [path.read_text() for path in sorted((PROMETHEUS / "tests").glob("*.yml"))]
    # alertname!="X" is no test of X.
    tested = set(re.findall(r'alertname(?:="|: )(\w+)', "".join(texts)))
    assert {rule["alert"] for rule in ALERTS} <= tested


def promtool(*arguments: str | Path) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if PROMTOOL is not None:  # deploy/check.sh needs it; here it is welcome

    def test_promtool_accepts_the_configuration() -> None:
        promtool("check", "config", PROMETHEUS / "prometheus.yml")

    @pytest.mark.parametrize("name", ["availability", "capacity", "objectives", "routing"])
    def test_the_rules_do_what_they_say(name: str) -> None:
        promtool("test", "rules", PROMETHEUS / "tests" / f"{name}.yml")
