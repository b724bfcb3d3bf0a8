"""Two steps of the image's build: what pip is to install, and whether that is the right torch."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import distributions, version
from pathlib import Path


def runtime_requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The dependencies of the project itself and of some of its extras."""
    project = tomllib.loads(pyproject.read_text())["project"]
    found: list[str] = [*project["dependencies"]]
    for extra in extras:
        found += project["optional-dependencies"][extra]
    return found


def variant_breach(variant: str) -> str | None:
    """Why what is installed here is not this variant ("cpu" or "cuda"), if it is not."""
    names = {str(found.metadata["Name"]).lower() for found in distributions()}
    cuda = sorted(name for name in names if name.startswith(("nvidia-", "cuda-")))
    if variant == "cpu" and cuda:
        return (
            f"torch {version('torch')} brought {', '.join(cuda)}; "
            "set TORCH_INDEX to an index of CPU builds, or VARIANT=cuda"
        )
    if variant == "cuda" and not cuda:
        return f"torch {version('torch')} is a build without CUDA"
    return None


def main(argv: list[str]) -> int:
    match argv:
        case ["list", pyproject, extras]:
            print(*runtime_requirements(Path(pyproject), extras.split()), sep="\n")
            return 0
        case ["check", variant]:
            breach = variant_breach(variant)
            if breach is not None:
                print(f"VARIANT={variant}: {breach}", file=sys.stderr)
            return int(breach is not None)
    print("usage: requirements.py list PYPROJECT EXTRAS | check VARIANT", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
