"""momaserve: inference and serving engine for modality-aware sparse models.

`LLM` and `SamplingParams` are imported when first used, so that `import momaserve` alone (as
the command line's `--help` does) loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from momaserve.async_engine import AsyncEngine
    from momaserve.llm import LLM
    from momaserve.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncEngine", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "momaserve.llm",
    "AsyncEngine": "momaserve.async_engine",
    "SamplingParams": "momaserve.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
