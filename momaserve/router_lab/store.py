"""Finished parts of a report in its folder: written whole, found again by what they depend on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from momaserve.training.run import write_atomically

FORMAT = 1
"""Raise it when a part computes something else than before from the same settings."""
_DIGITS = 6


class Store:
    """`DIR/parts/NAME.json`, one file per part."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "parts"
        self.directory.mkdir(parents=True, exist_ok=True)

    def load(self, name: str, depends_on: Mapping[str, Any]) -> dict[str, Any] | None:
        """A finished part; None if there is none, or it was made of something else."""
        try:
            stored = json.loads((self.directory / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(stored, dict) or stored.get("hash") != _hash(depends_on):
            return None
        result: dict[str, Any] = stored["result"]
        return result

    def save(
        self, name: str, depends_on: Mapping[str, Any], result: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Keep a part; returns it as `load` would."""
        stored = {"hash": _hash(depends_on), "result": plain(result)}
        text = json.dumps(stored, indent=1, allow_nan=False)
        write_atomically(self.directory / f"{name}.json", text + "\n")
        loaded: dict[str, Any] = json.loads(text)["result"]
        return loaded


def _hash(depends_on: Mapping[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **depends_on}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """As JSON has it: floats of a few digits, null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Integral):  # of numpy
        return int(value)
    number = float(value)
    return float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else None
