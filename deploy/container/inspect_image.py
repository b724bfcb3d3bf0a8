"""What must hold of the image itself: its configuration, and what must not be in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMPILERS = ("cc", "gcc", "g++", "cc1", "clang", "ld", "make", "cargo", "rustc", "nvcc")


def config_breaches(config: dict[str, Any]) -> Iterator[str]:
    wanted = {
        "User": "10001:10001",
        "Entrypoint": ["momaserve"],
        "Cmd": ["serve"],
        "StopSignal": "SIGTERM",
    }
    for name, value in wanted.items():
        if config.get(name) != value:
            yield f"{name} is {config.get(name)!r}, not {value!r}"
    if "MOMASERVE_HOST=0.0.0.0" not in config["Env"]:
        yield "it does not listen on all addresses"
    if config["Healthcheck"]["Test"][0] != "CMD":
        yield "the health check needs a shell"
    if any(name.startswith("PIP_") for name in config["Env"]):
        yield "settings of the build's pip are in the environment"
    labels = config.get("Labels") or {}
    for name in ("title", "description", "licenses", "version", "revision"):
        if not labels.get(f"org.opencontainers.image.{name}"):
            yield f"no label org.opencontainers.image.{name}"


def content_breaches(root: Path) -> Iterator[str]:
    for directory in ("usr/bin", "usr/local/bin", "opt/momaserve/bin"):
        for name in COMPILERS:
            if (root / directory / name).exists():
                yield f"a compiler: /{directory}/{name}"
    for name in ("etc/pip.conf", "root/.cache/pip", "root/.config/pip", "tmp/.cache", "build"):
        if (root / name).exists():
            yield f"left over from the build: /{name}"
    site = next((root / "opt/momaserve/lib").glob("python3*/site-packages"))
    for name in ("pip", "hatchling", "pytest", "torch/test"):
        if (site / name).exists():
            yield f"not needed to serve: {name}"
    yield from (f"tests: {path.relative_to(site)}" for path in site.rglob("tests") if path.is_dir())
    if not (site / "momaserve/demo/model.safetensors").is_file():
        yield "the demo checkpoint is missing"


def main(image: str, root: str) -> int:
    description = json.loads(Path(image).read_text())
    breaches = [
        *config_breaches(description["Docker"]["config"]),
        *content_breaches(Path(root)),
    ]
    for breach in breaches:
        print(f"inspect_image: {breach}", file=sys.stderr)
    if not breaches:
        print(f"{'configuration and contents':34} as promised")
    return int(bool(breaches))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
