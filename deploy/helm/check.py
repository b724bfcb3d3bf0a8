"""Checks the chart with the real Helm, and keeps what it renders for the ordinary tests.

    python deploy/helm/check.py            lint, render, validate, compare
    python deploy/helm/check.py --write    the same, and store what it rendered

Needs the packages that `deploy/check.sh` installs: `helm_python` (Helm's own Go library) and
`kubernetes_validate` (the API's schemas). Not part of the server.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CHART = HERE / "momaserve"
RENDERED = HERE.parent.parent / "tests" / "deploy" / "rendered"
RELEASE, NAMESPACE = "release", "space"
NOT_KEPT = {"monitoring"}
"""Renders that only repeat files which have tests of their own."""
KUBERNETES_VERSIONS = ("1.28", "1.31", "1.34", "1.37")
CUSTOM_KINDS = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds of other projects, which the API's schemas do not know."""
WARNING = 2

REFUSED: dict[str, dict[str, Any]] = {
    "an unknown value": {"replicas": 2},
    "a setting with a value of its own": {"settings": {"drain_timeout": 5}},
    "a relative checkpoint": {"model": {"checkpoint": "models/x"}},
    "a kind of autoscaling that does not exist": {"autoscaling": {"kind": "vpa"}},
    "a key with a blank": {"auth": {"apiKeys": ["two words"]}},
    "a grace period that cuts the drain off": {
        "terminationGracePeriodSeconds": 30,
        "drain": {"timeoutSeconds": 60},
    },
    "an ingress without host": {"ingress": {"enabled": True}},
}
"""Values that Helm must refuse to render."""


def values_files() -> dict[str, Path]:
    """By name; `ci/*-values.yaml` is where chart tools look for them."""
    files = sorted((CHART / "ci").glob("*-values.yaml"))
    return {path.name.removesuffix("-values.yaml"): path for path in files}


def digest(values: Path) -> str:
    """Changes with whatever a render is made of, but for the rules and the dashboard."""
    sources = [CHART / "Chart.yaml", CHART / "values.yaml", CHART / "values.schema.json", values]
    sources += sorted(path for path in (CHART / "templates").rglob("*") if path.is_file())
    total = hashlib.sha256()
    for path in sources:
        total.update(str(path.relative_to(CHART)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def documents(text: str) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(text) if found]


def render(values: dict[str, Any]) -> str:
    """What `helm template` prints, notes left out."""
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        parts = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    kept = {name: text.strip() for name, text in parts.items() if not name.endswith("NOTES.txt")}
    return "".join(f"---\n# {name}\n{text}\n" for name, text in sorted(kept.items()) if text)


def lint_breaches(values: dict[str, Any]) -> Iterator[str]:
    import helm_python

    report = helm_python.lint(
        CHART, values, strict=True, kube_version=f"v{KUBERNETES_VERSIONS[0]}.0"
    )
    yield from report["errors"]
    yield from (
        f"{found['path']}: {found['error']}"
        for found in report["messages"]
        if found["severity"] >= WARNING
    )


def api_breaches(manifests: list[dict[str, Any]]) -> Iterator[str]:
    import kubernetes_validate

    for manifest in manifests:
        if manifest["kind"] in CUSTOM_KINDS:
            continue
        for version in KUBERNETES_VERSIONS:
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{manifest['kind']} in Kubernetes {version}: {error}"


def rule_breaches(manifests: list[dict[str, Any]]) -> Iterator[str]:
    """Asks promtool about the rules as the chart renders them."""
    for manifest in manifests:
        if manifest["kind"] != "PrometheusRule":
            continue
        with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
            yaml.safe_dump(manifest["spec"], file)
            file.flush()
            done = subprocess.run(
                ["promtool", "check", "rules", file.name], capture_output=True, text=True
            )
        if done.returncode != 0:
            yield done.stdout + done.stderr


def refusal_breaches() -> Iterator[str]:
    import helm_python

    for what, values in REFUSED.items():
        try:
            render(values)
        except helm_python.HelmError:
            continue
        yield f"Helm renders {what}: {values}"


def header(values: Path) -> str:
    import helm_python

    return (
        f"# Rendered by Helm {helm_python.helm_sdk_version()} with ci/{values.name}; after a change"
        " of the chart:\n# deploy/check.sh --write\n"
        f"# chart: {digest(values)}\n"
    )


def check(name: str, path: Path, *, write: bool) -> list[str]:
    values: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
    text = render(values)
    manifests = documents(text)
    breaches = [*lint_breaches(values), *api_breaches(manifests)]
    if shutil.which("promtool") is None:
        print("helm/check.py: promtool is missing: rendered rules are not checked")
    else:
        breaches += rule_breaches(manifests)
    if name not in NOT_KEPT:
        kept = RENDERED / f"{name}.yaml"
        wanted = header(path) + text
        if write:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(wanted)
        elif not kept.exists() or kept.read_text() != wanted:
            breaches.append(f"{kept} is not what Helm renders: deploy/check.sh --write")
    kinds = ", ".join(manifest["kind"] for manifest in manifests)
    print(f"helm: {path.name}: {len(breaches)} breaches in {kinds}")
    return [f"{path.name}: {breach}" for breach in breaches]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="store what is rendered")
    args = parser.parse_args()
    breaches = [
        breach
        for name, path in values_files().items()
        for breach in check(name, path, write=args.write)
    ]
    refusals = list(refusal_breaches())
    print(f"helm: {len(REFUSED) - len(refusals)} of {len(REFUSED)} bad values are refused")
    for breach in breaches + refusals:
        print(f"helm: {breach}", file=sys.stderr)
    return int(bool(breaches or refusals))


if __name__ == "__main__":
    sys.exit(main())
