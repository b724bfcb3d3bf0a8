"""The Dockerfile and the small programs around it. Building and running: container/check.sh."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.container import bundle, inspect_image, pip_settings, requirements
from momaserve_server.cli_options import SERVE_OPTIONS
from tests.deploy.files import ROOT
from tests.server.live import live


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments), continued lines joined and comments left out."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, " ".join(rest.split()))
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def stages() -> list[list[tuple[str, str]]]:
    found: list[list[tuple[str, str]]] = [[]]
    for name, rest in instructions():
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest))
    return found[1:]


def environment() -> dict[str, str]:
    (words,) = (rest for name, rest in stages()[-1] if name == "ENV")
    return dict(word.split("=", 1) for word in words.split())


def health_command() -> list[str]:
    (rest,) = (rest for name, rest in stages()[-1] if name == "HEALTHCHECK")
    command: list[str] = json.loads(rest[rest.index("CMD ") + 4 :])
    return command


def test_the_last_stage_runs_nothing_but_the_server() -> None:
    last = stages()[-1]
    by_name = dict(last)
    assert by_name["USER"] == "10001:10001"
    assert by_name["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(by_name["ENTRYPOINT"]) == ["momaserve"]  # a shell would swallow SIGTERM
    assert json.loads(by_name["CMD"]) == ["serve"]
    assert all("pip" not in rest for name, rest in last if name == "RUN")
    assert all(rest.startswith("--from=") for name, rest in last if name == "COPY")
    assert "org.opencontainers.image.licenses" in by_name["LABEL"]


def test_secrets_and_the_builders_pip_stay_in_the_first_stages() -> None:
    last = " ".join(rest for _, rest in stages()[-1])
    assert "PIP_" not in last and "secret" not in last
    for name, rest in instructions():
        if name == "ENV":
            assert "PIP_" not in rest
        if name == "RUN" and " install " in rest and "--no-index" not in rest:
            assert "--mount=type=secret,id=pip_conf" in rest
            assert "--no-cache-dir" in rest
            assert "--constraint constraints.txt" in rest


def test_code_is_copied_after_the_dependencies_are_installed() -> None:
    """Otherwise every change of the code would install torch again."""
    dependencies, application, _ = stages()
    copied = [rest for name, rest in dependencies if name == "COPY"]
    assert copied == [
        "pyproject.toml constraints.txt deploy/container/requirements.py ./",
    ]
    assert application[0] == ("FROM", "dependencies AS application")
    for package in ("momaserve", "server", "benchmarks"):
        assert ("COPY", f"{package} {package}") in application


def copied_from_the_context() -> Iterator[str]:
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from="):
            yield from rest.split()[:-1]


def test_the_context_is_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(copied_from_the_context())
    assert [rule for rule in rules[1:] if not rule.startswith("!")] == ["**/__pycache__"]
    for name in copied_from_the_context():
        assert (ROOT / name).exists()


def test_the_environment_is_known_to_the_server() -> None:
    known = {option.environment_name for option in SERVE_OPTIONS}
    ours = {name for name in environment() if name.startswith("MOMASERVE_")}
    assert ours == {"MOMASERVE_HOST", "MOMASERVE_PORT"}
    assert ours <= known
    assert environment()["MOMASERVE_HOST"] == "0.0.0.0"
    assert environment()["PYTHONDONTWRITEBYTECODE"] == "1"
    (port,) = (rest for name, rest in stages()[-1] if name == "EXPOSE")
    assert environment()["MOMASERVE_PORT"] == port


def run_health_command(port: int) -> int:
    program, *arguments = health_command()
    assert program == "python3"
    variables = {**os.environ, "MOMASERVE_PORT": str(port)}
    done = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True)
    return done.returncode


def test_the_health_check_tells_a_healthy_server_from_a_sick_one() -> None:
    with live() as running:
        port = int(running.url.rpartition(":")[2])
        assert run_health_command(port) == 0
        running.fake.is_healthy = False
        assert run_health_command(port) != 0


def test_requirements_are_those_of_the_project_and_its_extras(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\ndependencies = ["torch>=2.10", "numpy"]\n'
        '[project.optional-dependencies]\notel = ["opentelemetry-sdk"]\ntrain = ["matplotlib"]\n'
    )
    assert requirements.main(["list", str(project), ""]) == 0
    assert capsys.readouterr().out.split() == ["torch>=2.10", "numpy"]
    assert requirements.main(["list", str(project), "otel train"]) == 0
    assert capsys.readouterr().out.split()[2:] == ["opentelemetry-sdk", "matplotlib"]
    assert requirements.main(["list"]) == 2


def test_default_extras_exist() -> None:
    (extras,) = (rest for name, rest in instructions() if name == "ARG" and "EXTRAS" in rest)
    assert requirements.runtime_requirements(
        ROOT / "pyproject.toml", extras.removeprefix("EXTRAS=").strip('"').split()
    )


class Distribution:
    def __init__(self, name: str) -> None:
        self.metadata = {"Name": name}


@pytest.mark.parametrize(
    ("variant", "installed", "complaint"),
    [
        ("cpu", ["torch"], None),
        ("cpu", ["torch", "nvidia-cublas", "cuda-bindings"], "cuda-bindings, nvidia-cublas"),
        ("cuda", ["torch", "nvidia-cublas"], None),
        ("cuda", ["torch"], "without CUDA"),
    ],
)
def test_the_wrong_torch_ends_the_build(
    monkeypatch: pytest.MonkeyPatch, variant: str, installed: list[str], complaint: str | None
) -> None:
    monkeypatch.setattr(requirements, "distributions", lambda: map(Distribution, installed))
    breach = requirements.variant_breach(variant)
    assert (breach is None) if complaint is None else (breach is not None and complaint in breach)
    assert requirements.main(["check", variant]) == (0 if complaint is None else 1)


def test_local_parts_of_pip_settings_are_mounted(tmp_path: Path) -> None:
    index, wheels, certificates = tmp_path / "index", tmp_path / "wheels", tmp_path / "ca.pem"
    (index / "simple").mkdir(parents=True)
    wheels.mkdir()
    certificates.touch()
    settings = {
        "index-url": "https://example.org/simple",
        "extra-index-url": f"file://{index}/simple https://example.org/more",
        "find-links": f"{wheels} relative {tmp_path}/missing",
        "cert": str(certificates),
    }
    assert pip_settings.local_paths(settings) == sorted([index, wheels, certificates])


def test_a_bundle_is_locked_and_otherwise_the_image() -> None:
    image = {"Entrypoint": ["momaserve"], "Cmd": ["serve"], "Env": ["A=b"]}
    made = bundle.specification(image, Path("/r"), uid=10001, tmp=False)
    assert made["root"] == {"path": "/r", "readonly": True}
    process = made["process"]
    assert process["args"] == ["momaserve", "serve"] and process["env"] == ["A=b"]
    assert process["user"] == {"uid": 10001, "gid": 10001}
    assert process["noNewPrivileges"] is True
    assert set(map(tuple, process["capabilities"].values())) == {()}
    kinds = {namespace["type"] for namespace in made["linux"]["namespaces"]}
    assert kinds == {"pid", "ipc", "uts", "mount", "network"}
    assert "/tmp" not in {mount["destination"] for mount in made["mounts"]}
    with_tmp = bundle.specification(image, Path("/r"), uid=1, tmp=True)
    assert "/tmp" in {mount["destination"] for mount in with_tmp["mounts"]}


GOOD_CONFIG = {
    "User": "10001:10001",
    "Entrypoint": ["momaserve"],
    "Cmd": ["serve"],
    "StopSignal": "SIGTERM",
    "Env": ["MOMASERVE_HOST=0.0.0.0"],
    "Healthcheck": {"Test": ["CMD", "python3"]},
    "Labels": {
        f"org.opencontainers.image.{name}": "x"
        for name in ("title", "description", "licenses", "version", "revision")
    },
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"User": "root"}, "User is 'root'"),
        ({"Env": []}, "all addresses"),
        ({"Env": ["MOMASERVE_HOST=0.0.0.0", "PIP_INDEX_URL=x"]}, "build's pip"),
        ({"Healthcheck": {"Test": ["CMD-SHELL", "x"]}}, "needs a shell"),
        ({"Labels": None}, "no label"),
    ],
)
def test_an_image_that_breaks_a_promise_is_noticed(
    change: dict[str, object], complaint: str | None
) -> None:
    breaches = list(inspect_image.config_breaches(GOOD_CONFIG | change))
    assert (not breaches) if complaint is None else any(complaint in text for text in breaches)


def test_left_overs_in_an_image_are_noticed(tmp_path: Path) -> None:
    site = tmp_path / "opt/momaserve/lib/python3.11/site-packages"
    (site / "momaserve/demo").mkdir(parents=True)
    (site / "momaserve/demo/model.safetensors").touch()
    assert list(inspect_image.content_breaches(tmp_path)) == []
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/pip.conf").touch()
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/gcc").touch()
    (site / "numpy/tests").mkdir(parents=True)
    (site / "pip").mkdir()
    found = sorted(inspect_image.content_breaches(tmp_path))
    wanted = ["a compiler: /usr/bin/gcc", "left over*", "not needed to serve: pip", "tests: numpy*"]
    assert all(map(fnmatch.fnmatchcase, found, wanted)) and len(found) == len(wanted)
