"""compose.yaml: every service locked down, and stops that let a server drain."""

from __future__ import annotations

import re
from typing import Any

import pytest

from momaserve_server.cli_options import SERVE_OPTIONS
from momaserve_server.serving import CLOSE_TIMEOUT_S
from tests.deploy.files import DEPLOY, load_yaml

SERVICES: dict[str, dict[str, Any]] = load_yaml(DEPLOY / "compose.yaml")["services"]
GPU: dict[str, dict[str, Any]] = load_yaml(DEPLOY / "compose.gpu.yaml")["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_locked_down(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service and "cap_add" not in service
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["restart"] == "unless-stopped"
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:"), "open to the network without being asked"


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"momaserve"}))
def test_foreign_images_are_pinned(name: str) -> None:
    assert re.fullmatch(r"[a-z-]+/[a-z-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_exists(name: str) -> None:
    volumes = load_yaml(DEPLOY / "compose.yaml")["volumes"]
    for mount in SERVICES[name].get("volumes", ()):
        source = mount.split(":")[0]
        if source.startswith("."):
            assert (DEPLOY / source).exists()
            assert mount.endswith(":ro")
        else:
            assert source in volumes


def test_a_stop_waits_for_the_drain() -> None:
    server = SERVICES["momaserve"]
    drain_s = float(server["environment"]["MOMASERVE_DRAIN_TIMEOUT"])
    grace = re.fullmatch(r"(\d+)s", server["stop_grace_period"])
    assert grace is not None and int(grace[1]) >= drain_s + CLOSE_TIMEOUT_S + 5
    assert server["init"] is True


@pytest.mark.parametrize("services", [SERVICES, GPU], ids=["compose", "gpu"])
def test_settings_are_those_of_the_server(services: dict[str, Any]) -> None:
    known = {option.environment_name for option in SERVE_OPTIONS}
    assert set(services["momaserve"]["environment"]) <= known


def test_threads_are_the_processors_that_it_may_use() -> None:
    server = SERVICES["momaserve"]
    limit = server["deploy"]["resources"]["limits"]["cpus"]
    assert server["environment"]["MOMASERVE_THREADS"] == limit


def test_others_wait_until_requests_are_taken() -> None:
    assert "/ready" in SERVICES["momaserve"]["healthcheck"]["test"][-1]


def test_the_gpu_file_only_adds() -> None:
    assert set(GPU) == {"momaserve"}
    assert GPU["momaserve"]["build"]["args"] == {"VARIANT": "cuda"}
    (device,) = GPU["momaserve"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])
