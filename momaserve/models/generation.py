"""`generation_config.json`: a checkpoint's default sampling, for text and for pictures.

The file holds an object with the optional keys `text` and `image`, each an object with the
optional keys `temperature`, `top_k`, `top_p`, `min_p`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from momaserve.errors import CheckpointError, SamplingError
from momaserve.models.config import read_json_object
from momaserve.sampling import Distribution

FILE_NAME = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """How tokens are drawn when a request does not say."""

    text: Distribution = field(default_factory=Distribution)
    image: Distribution = field(default_factory=Distribution)

    @classmethod
    def load(cls, directory: Path) -> GenerationDefaults:
        """Defaults of a checkpoint; plain sampling where it has no file.

        Raises:
            CheckpointError: unknown keys or values out of range.
        """
        path = directory / FILE_NAME
        if not path.exists():
            return cls()
        data = read_json_object(path)
        unknown = sorted(set(data) - {"text", "image"})
        if unknown:
            raise CheckpointError(f"{path}: unknown keys {unknown}")
        return cls(**{name: _distribution(path, name, value) for name, value in data.items()})


def _distribution(path: Path, name: str, value: Any) -> Distribution:
    known = {f.name for f in fields(Distribution)}
    if not isinstance(value, dict) or not set(value) <= known:
        raise CheckpointError(f"{path}: {name} must be an object with keys out of {sorted(known)}")
    if not all(type(v) in (int, float) for v in value.values()):
        raise CheckpointError(f"{path}: {name} must hold numbers, got {value}")
    distribution = Distribution(**value)
    try:
        distribution.check()
    except SamplingError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error
    return distribution
