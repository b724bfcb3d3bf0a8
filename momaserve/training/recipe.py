"""A recipe: every setting of a demo build, read from one TOML file and checked by name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from momaserve.errors import ConfigError
from momaserve.training.fit_routers import FitRoutersConfig
from momaserve.training.image_tokenizer import ImageTokenizerTraining
from momaserve.training.pretrain import PretrainConfig

RECIPES = Path(__file__).parent / "recipes"
_Settings = TypeVar("_Settings")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Which of the dictionary's pictures are learnt, and how words are cut."""

    kinds: tuple[str, ...]
    tones_of_held_out_persons: bool = False
    codes_kinds: tuple[str, ...] = ()
    """Kinds that the image tokenizer's codes are trained on; empty: those that are learnt."""
    text_vocab_size: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All stages of a demo checkpoint."""

    data: DataSettings
    image_tokenizer: ImageTokenizerTraining
    image_decoder: ImageTokenizerTraining
    model: Mapping[str, Any]
    """Keys of `config.json` that do not follow from tokenizers and data."""
    pretrain: PretrainConfig
    routers: FitRoutersConfig
    generation: Mapping[str, Any]
    """The content of generation_config.json."""

    @classmethod
    def load(cls, name_or_path: str) -> Recipe:
        """Read a shipped recipe by name, or a file.

        Raises:
            ConfigError: no such recipe, not TOML, or a section or key that is unknown.
        """
        path = Path(name_or_path)
        if path.suffix != ".toml":
            path = RECIPES / f"{name_or_path}.toml"
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            shipped = sorted(p.stem for p in RECIPES.glob("*.toml"))
            raise ConfigError(f"no recipe {name_or_path!r}; shipped ones: {shipped}") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"recipe {path} cannot be read: {error}") from error
        wanted = {field.name for field in fields(cls)}
        if set(data) != wanted:
            raise ConfigError(
                f"recipe {path}: sections must be {sorted(wanted)}, got {sorted(data)}"
            )
        for section, value in data.items():
            if not isinstance(value, dict):
                raise ConfigError(
                    f"recipe section {section} must be a table, got {type(value).__name__}"
                )
        return cls(
            data=_settings(DataSettings, data["data"], "data"),
            image_tokenizer=_settings(
                ImageTokenizerTraining, data["image_tokenizer"], "image_tokenizer"
            ),
            image_decoder=_settings(ImageTokenizerTraining, data["image_decoder"], "image_decoder"),
            model=data["model"],
            pretrain=_settings(PretrainConfig, data["pretrain"], "pretrain"),
            routers=_settings(FitRoutersConfig, data["routers"], "routers"),
            generation=data["generation"],
        )


def _settings(cls: type[_Settings], data: Mapping[str, Any], section: str) -> _Settings:
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ConfigError(f"recipe section {section}: unknown keys {unknown}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"recipe section {section}: {error}") from error
