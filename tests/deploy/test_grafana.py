"""The dashboard: complete, tidy, and independent of one data source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest

from tests.deploy.files import DEPLOY, dashboard, load_yaml, panels

PANELS = panels()
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def variables() -> dict[str, dict[str, Any]]:
    return {found["name"]: found for found in dashboard()["templating"]["list"]}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_panel_explains_itself(panel: dict[str, Any]) -> None:
    assert panel["title"].strip()
    assert len(panel["description"]) > 10
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    assert panel["datasource"] == DATASOURCE
    assert all(target["datasource"] == DATASOURCE for target in panel["targets"])
    references = [target["refId"] for target in panel["targets"]]
    assert len(references) == len(set(references))


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
def test_a_panel_shows_what_was_chosen_and_no_more(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        selectors = re.findall(r"\{([^}]*)\}", target["expr"])
        assert selectors
        for selector in selectors:
            assert 'job=~"$job"' in selector and 'instance=~"$instance"' in selector
        # A fixed window is wrong for all but one zoom level and scrape interval.
        assert re.findall(r"\[([^\]]*)\]", target["expr"]) == ["$__rate_interval"] * target[
            "expr"
        ].count("rate(")


def test_ids_and_titles_are_unique() -> None:
    everything = dashboard()["panels"]
    ids = [panel["id"] for panel in everything]
    titles = [panel["title"] for panel in everything]
    assert len(ids) == len(set(ids))
    assert len(titles) == len(set(titles))


def cells(panel: dict[str, Any]) -> Iterator[tuple[int, int]]:
    place = panel["gridPos"]
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


def test_panels_lie_side_by_side() -> None:
    for panel in dashboard()["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations(dashboard()["panels"], 2):
        assert not set(cells(one)) & set(cells(other)), (one["title"], other["title"])


def test_every_variable_is_there_and_used() -> None:
    text = str(dashboard()["panels"]) + str(dashboard()["templating"])
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"}
    assert used == set(variables())
    assert variables()["datasource"]["type"] == "datasource"
    for name in ("job", "instance", "group", "layer"):
        assert variables()[name]["includeAll"]
        assert variables()[name]["datasource"] == DATASOURCE


def test_what_operators_look_for_is_there() -> None:
    everything = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    for quantile in ("0.5", "0.95", "0.99"):
        for metric in (
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "image_latency_seconds",
        ):
            assert re.search(
                rf"histogram_quantile\({re.escape(quantile)}, [^$]*momaserve_{metric}_bucket",
                everything,
            )
    repeated = [panel for panel in PANELS if panel.get("repeat")]
    assert [panel["repeat"] for panel in repeated] == ["group"]


def test_it_is_provisioned_with_the_scrape_interval_of_prometheus() -> None:
    (source,) = load_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"]
    interval = load_yaml(DEPLOY / "prometheus/prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load_yaml(DEPLOY / "grafana/provisioning/dashboards/momaserve.yml")["providers"]
    mounts = load_yaml(DEPLOY / "compose.yaml")["services"]["grafana"]["volumes"]
    assert f"./grafana/momaserve.json:{provider['options']['path']}/momaserve.json:ro" in mounts
