"""The Helm chart, as Helm itself renders it.

`deploy/check.sh --write` renders `ci/*-values.yaml` into `rendered/`; here nothing is rendered,
but a chart that has changed since is noticed, and what came out must fit the server.
"""

from __future__ import annotations

import argparse
import base64
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.helm.check import NOT_KEPT, RELEASE, RENDERED, digest, documents, values_files
from momaserve import __version__
from momaserve_server.cli_options import SERVE_OPTIONS, engine_config, server_settings
from momaserve_server.serve_options import add_arguments
from momaserve_server.serving import CLOSE_TIMEOUT_S
from momaserve_server.settings import ServerSettings
from tests.deploy.files import CHART, DEPLOY, load_yaml

NAMES = sorted(set(values_files()) - NOT_KEPT)
every_render = pytest.mark.parametrize("name", NAMES)
Manifest = dict[str, Any]


@cache
def manifests(name: str) -> list[Manifest]:
    return documents((RENDERED / f"{name}.yaml").read_text(encoding="utf-8"))


def only(name: str, kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests(name) if manifest["kind"] == kind)
    return found


def pod(name: str) -> Manifest:
    spec: Manifest = only(name, "Deployment")["spec"]["template"]["spec"]
    return spec


def server(name: str) -> Manifest:
    (container,) = pod(name)["containers"]
    found: Manifest = container
    return found


def is_part_of(wanted: dict[str, str], labels: dict[str, str]) -> bool:
    return wanted.items() <= labels.items()


@every_render
def test_what_is_stored_was_made_from_this_chart(name: str) -> None:
    first_lines = (RENDERED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[:3]
    assert f"# chart: {digest(values_files()[name])}" in first_lines, "run deploy/check.sh --write"


def test_nothing_else_is_stored() -> None:
    assert sorted(path.stem for path in RENDERED.glob("*.yaml")) == NAMES


@every_render
def test_probes_ask_the_routes_that_mean_them(name: str) -> None:
    container = server(name)
    asked = {kind: container[kind]["httpGet"] for kind in container if kind.endswith("Probe")}
    assert asked == {
        "startupProbe": {"path": "/ready", "port": "http"},
        "livenessProbe": {"path": "/health", "port": "http"},
        "readinessProbe": {"path": "/ready", "port": "http"},
    }
    (port,) = container["ports"]
    assert port["name"] == "http"
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    # A stuck server does not drain.
    assert container["livenessProbe"]["terminationGracePeriodSeconds"] <= 15


@every_render
def test_a_pod_has_the_time_to_drain(name: str) -> None:
    drain_s = float(only(name, "ConfigMap")["data"]["MOMASERVE_DRAIN_TIMEOUT"])
    command = server(name)["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep" and int(command[1]) >= 5
    least = int(command[1]) + drain_s + CLOSE_TIMEOUT_S
    assert pod(name)["terminationGracePeriodSeconds"] > least


@every_render
def test_containers_are_locked_down(name: str) -> None:
    test_pod = only(name, "Pod")["spec"]
    for spec in (pod(name), test_pod):
        assert spec["automountServiceAccountToken"] is False
        whole = spec["securityContext"]
        assert whole["runAsNonRoot"] is True
        assert whole["runAsUser"] == whole["runAsGroup"] == whole["fsGroup"] == 10001
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= set(container["resources"])
            for mount in container.get("volumeMounts", ()):
                assert mount["mountPath"] == "/tmp" or mount["readOnly"] is True


@every_render
def test_selectors_find_the_servers_and_nothing_else(name: str) -> None:
    labels = only(name, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [
        only(name, "Deployment")["spec"]["selector"]["matchLabels"],
        only(name, "Service")["spec"]["selector"],
    ]
    for manifest in manifests(name):
        if manifest["kind"] == "PodDisruptionBudget":
            selectors.append(manifest["spec"]["selector"]["matchLabels"])
        if manifest["kind"] == "NetworkPolicy":
            selectors.append(manifest["spec"]["podSelector"]["matchLabels"])
        if manifest["kind"] == "ServiceMonitor":
            service = only(name, "Service")["metadata"]["labels"]
            assert is_part_of(manifest["spec"]["selector"]["matchLabels"], service)
    for selector in selectors:
        assert is_part_of(selector, labels)
        assert not is_part_of(selector, only(name, "Pod")["metadata"]["labels"])


@every_render
def test_whatever_is_named_is_there(name: str) -> None:
    objects = {(m["kind"], m["metadata"]["name"]) for m in manifests(name)}
    assert len(objects) == len(manifests(name))
    (source, *_) = server(name)["envFrom"]
    assert ("ConfigMap", source["configMapRef"]["name"]) in objects
    volumes = {volume["name"] for volume in pod(name)["volumes"]}
    assert {mount["name"] for mount in server(name)["volumeMounts"]} == volumes
    deployment = only(name, "Deployment")["metadata"]["name"]
    for manifest in manifests(name):
        target = manifest["spec"].get("scaleTargetRef") if "spec" in manifest else None
        if target is not None:
            assert target["name"] == deployment
        if manifest["kind"] == "Ingress":
            (rule,) = manifest["spec"]["rules"]
            backend = rule["http"]["paths"][0]["backend"]["service"]
            assert ("Service", backend["name"]) in objects


@every_render
def test_the_server_takes_these_arguments_and_settings(name: str, tmp_path: Path) -> None:
    """The real parser reads what the container would get."""
    keys = tmp_path / "api-keys"
    keys.write_text("first-key\nsecond-key\n")
    environment = dict(only(name, "ConfigMap")["data"])
    words = [
        word.replace("/etc/momaserve/keys/api-keys", str(keys)) for word in server(name)["args"]
    ]
    assert words[0] == "serve"
    known = {option.environment_name for option in SERVE_OPTIONS}
    assert set(environment) <= known
    assert {entry["name"] for entry in server(name).get("env", ())} - {"OMP_PROC_BIND"} <= known

    settings = parsed(words[1:], environment)
    assert (settings.host, settings.port) == ("0.0.0.0", server(name)["ports"][0]["containerPort"])
    assert bool(settings.api_keys) == (name in {"keys", "everything"})
    if name == "keys":
        assert settings.served_model_name == "pictures"
        assert settings.cors_origins == ("https://a.example.org", "https://b.example.org")


def parsed(words: list[str], environment: dict[str, str]) -> ServerSettings:
    parser = argparse.ArgumentParser()
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        add_arguments(parser)
    args = parser.parse_args(words)
    engine_config(args)
    return server_settings(args)


def test_a_setting_of_a_wrong_name_would_be_noticed() -> None:
    with pytest.raises(SystemExit):
        parsed(["--max-num-request=3", "--unknown"], {})


def test_replicas_belong_to_the_autoscaler_where_there_is_one() -> None:
    assert only("default", "Deployment")["spec"]["replicas"] == 1
    for name in ("everything", "gpu"):
        assert "replicas" not in only(name, "Deployment")["spec"]
    (metric,) = only("everything", "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "momaserve_num_requests_waiting"
    (trigger,) = only("gpu", "ScaledObject")["spec"]["triggers"]
    service = only("gpu", "Service")["metadata"]["name"]
    assert f'{{namespace="space",service="{service}"}}' in trigger["metadata"]["query"]


def test_keys_come_from_one_secret_or_the_other() -> None:
    made = only("keys", "Secret")
    assert base64.b64decode(made["data"]["api-keys"]) == b"first-key\nsecond-key\n"
    assert {m["kind"] for m in manifests("everything")}.isdisjoint({"Secret"})
    for name, secret, key in (
        ("keys", made["metadata"]["name"], "api-keys"),
        ("everything", "my-keys", "keys"),
    ):
        (volume,) = (volume for volume in pod(name)["volumes"] if volume["name"] == "keys")
        assert volume["secret"]["secretName"] == secret
        assert volume["secret"]["items"] == [{"key": key, "path": "api-keys"}]
    assert not any("key" in word for word in server("default")["args"])


def test_a_checkpoint_on_a_claim_is_mounted_where_it_is_looked_for() -> None:
    (mount,) = (m for m in server("keys")["volumeMounts"] if m["name"] == "models")
    assert mount == {"name": "models", "mountPath": "/models", "readOnly": True, "subPath": "v2"}
    assert server("keys")["args"][1] == "/models/pictures"
    (volume,) = (volume for volume in pod("keys")["volumes"] if volume["name"] == "models")
    assert volume["persistentVolumeClaim"] == {"claimName": "checkpoints", "readOnly": True}


def test_threads_follow_the_limit_unless_they_are_set() -> None:
    (threads,) = server("default")["env"]
    assert threads["name"] == "MOMASERVE_THREADS"
    assert threads["valueFrom"]["resourceFieldRef"]["resource"] == "limits.cpu"
    assert only("everything", "ConfigMap")["data"]["MOMASERVE_THREADS"] == "4"
    assert "env" not in server("gpu")


def test_a_gpu_is_asked_for_with_the_image_that_can_use_it() -> None:
    assert server("gpu")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert server("gpu")["image"] == f"momaserve:{__version__}-cuda"
    assert only("gpu", "ConfigMap")["data"]["MOMASERVE_DEVICE"] == "cuda"
    assert server("default")["image"] == f"momaserve:{__version__}"


def test_streams_pass_the_ingress_unbuffered() -> None:
    annotations = only("everything", "Ingress")["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io/"
    assert annotations[f"{prefix}proxy-buffering"] == "off"
    assert int(annotations[f"{prefix}proxy-read-timeout"]) >= 600
    (size,) = re.findall(r"^(\d+)m$", annotations[f"{prefix}proxy-body-size"])
    assert int(size) << 20 == ServerSettings().max_body_bytes


def test_rules_and_dashboard_are_those_of_prometheus_and_grafana() -> None:
    for name, source in (
        ("recording.yml", DEPLOY / "prometheus" / "recording.yml"),
        ("alerts.yml", DEPLOY / "prometheus" / "alerts.yml"),
        ("dashboard.json", DEPLOY / "grafana" / "momaserve.json"),
    ):
        assert (CHART / "files" / name).resolve() == source


def test_values_and_their_schema_agree() -> None:
    schema = load_yaml(CHART / "values.schema.json")
    validator = jsonschema.Draft7Validator(schema)
    jsonschema.Draft7Validator.check_schema(schema)
    values = load_yaml(CHART / "values.yaml")
    assert set(schema["properties"]) - set(values) == {"global"}  # Helm's own
    for path in (CHART / "values.yaml", *values_files().values()):
        assert [error.message for error in validator.iter_errors(load_yaml(path))] == [], path
    assert not validator.is_valid({"settings": {"drain_timeout": 5}})
    assert not validator.is_valid({"replicas": 2})


def test_values_in_the_readme_are_values_of_the_chart() -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    ours = [block for block in blocks if "rules" not in block]  # those are prometheus-adapter's
    assert len(ours) == 2
    for block in ours:
        jsonschema.validate(block, load_yaml(CHART / "values.schema.json"))
    known = {option.dest for option in SERVE_OPTIONS}
    assert set(ours[0]["settings"]) <= known


def test_the_chart_is_of_this_version() -> None:
    assert load_yaml(CHART / "Chart.yaml")["appVersion"] == __version__
    assert RELEASE in only("default", "Deployment")["metadata"]["name"]
