"""`generation_config.json`: a checkpoint's default sampling, for text and for pictures.

The file holds an object with the optional keys `text` and `image`, each an object with the
optional keys `temperature`, `top_k`, `top_p`, `min_p`; `image` may also have `guidance_scale`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from momaserve.errors import CheckpointError, SamplingError
from momaserve.models.config import read_json_object
from momaserve.sampling import Distribution, SamplingParams

FILE_NAME = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """How tokens are drawn when a request does not say."""

    text: Distribution = field(default_factory=Distribution)
    image: Distribution = field(default_factory=Distribution)
    guidance_scale: float = 1.0
    """Of pictures; 1 is none."""

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
        defaults = cls()
        for name, value in data.items():
            defaults = replace(defaults, **_section(path, name, value))
        return defaults


def _section(path: Path, name: str, value: Any) -> dict[str, Any]:
    """Fields of GenerationDefaults that the object under `name` sets."""
    known = {f.name for f in fields(Distribution)}
    own = {"guidance_scale"} if name == "image" else set()
    if not isinstance(value, dict) or not set(value) <= known | own:
        raise CheckpointError(
            f"{path}: {name} must be an object with keys out of {sorted(known | own)}"
        )
    if not all(type(v) in (int, float) for v in value.values()):
        raise CheckpointError(f"{path}: {name} must hold numbers, got {value}")
    distribution = Distribution(**{key: v for key, v in value.items() if key in known})
    found = {name: distribution} | {key: v for key, v in value.items() if key in own}
    try:
        distribution.check()
        SamplingParams(**found)
    except SamplingError as error:
        raise CheckpointError(f"{path}: {name}: {error}") from error
    return found
