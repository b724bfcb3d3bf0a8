"""A recipe: every setting of a checkpoint's build, read from one TOML file, checked by name."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from momaserve.errors import ConfigError
from momaserve.models.image_tokenizer import ImageTokenizerConfig
from momaserve.training.documents.settings import DocumentSettings
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
    picture_share: float = 0.60
    """Of the exchanges, those that draw a picture."""
    name_share: float = 0.27
    """Those that name one; the rest explain words."""

    def __post_init__(self) -> None:
        shares = self.picture_share, self.name_share
        if min(shares) < 0 or sum(shares) > 1:
            raise ConfigError(
                "picture_share and name_share must be at least 0 and at most 1 together, "
                f"got {shares}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All stages of a checkpoint. A section that a run does not need may be absent (None)."""

    data: DataSettings | DocumentSettings
    """Of the illustrated dictionary, or of data that a user brings."""
    model: Mapping[str, Any]
    """Keys of `config.json` that do not follow from tokenizers and data."""
    pretrain: PretrainConfig
    image_tokenizer: ImageTokenizerTraining | None = None
    image_decoder: ImageTokenizerTraining | None = None
    routers: FitRoutersConfig | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    """The content of generation_config.json."""

    @classmethod
    def load(cls, name_or_path: str) -> Recipe:
        """Read a shipped recipe by name, or a file.

        Raises:
            ConfigError: no such recipe, not TOML, or a section or key that is unknown.

        A file that `extends` another recipe (a name, or a path from where it lies) has that one's
        settings, but for its own.
        """
        data = _read(name_or_path)
        optional = {name for name, _ in _STAGES} | {"generation"}
        if not _REQUIRED <= set(data) <= _REQUIRED | optional:
            raise ConfigError(
                f"recipe {name_or_path}: sections must be {sorted(_REQUIRED)} and may be "
                f"{sorted(optional)}, got {sorted(data)}"
            )
        for section, value in data.items():
            if not isinstance(value, dict):
                raise ConfigError(
                    f"recipe section {section} must be a table, got {type(value).__name__}"
                )
        pretrain = _settings(PretrainConfig, data["pretrain"], "pretrain")
        stages: dict[str, Any] = {
            name: _settings(settings, data[name], name)
            for name, settings in _STAGES
            if name in data
        }
        return cls(
            data=_data_settings(data["data"], pretrain),
            model=data["model"],
            pretrain=pretrain,
            generation=data.get("generation", {}),
            **stages,
        )

    @property
    def dictionary(self) -> DataSettings:
        """Raises ConfigError when the recipe is for other data."""
        if not isinstance(self.data, DataSettings):
            raise ConfigError('this works on the dictionary alone: data.source is "documents"')
        return self.data

    @property
    def picture_size(self) -> int:
        """Pixels along a side of the pictures that the image tokenizer reads."""
        settings = {} if self.image_tokenizer is None else self.image_tokenizer.model
        return ImageTokenizerConfig.from_dict(settings).image_size


def _read(name_or_path: str, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a recipe, with those that it extends.

    Args:
        extended_by: files that have led here.
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = RECIPES / f"{name_or_path}.toml"
    elif extended_by:
        path = extended_by[-1].parent / path
    if path in extended_by:
        raise ConfigError(f"recipe {path} extends itself")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = sorted(p.stem for p in RECIPES.glob("*.toml"))
        raise ConfigError(f"no recipe {name_or_path!r}; shipped ones: {shipped}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error}") from error
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ConfigError(f"recipe {path}: extends must be a name or a path, got {base!r}")
    merged = _read(base, (*extended_by, path))
    for section, value in data.items():
        both = isinstance(value, dict) and isinstance(merged.get(section), dict)
        merged[section] = {**merged[section], **value} if both else value
    return merged


_REQUIRED = {"data", "model", "pretrain"}
_STAGES: tuple[tuple[str, type], ...] = (
    ("image_tokenizer", ImageTokenizerTraining),
    ("image_decoder", ImageTokenizerTraining),
    ("routers", FitRoutersConfig),
)


def needed(settings: _Settings | None, section: str) -> _Settings:
    """A section that this run cannot do without. Raises ConfigError when it is absent."""
    if settings is None:
        raise ConfigError(f"the recipe has no section [{section}], which this command needs")
    return settings


def _data_settings(
    data: Mapping[str, Any], pretrain: PretrainConfig
) -> DataSettings | DocumentSettings:
    values = dict(data)
    source = values.pop("source", "dictionary")
    if source == "dictionary":
        return _settings(DataSettings, values, "data")
    if source != "documents":
        raise ConfigError(
            f'recipe section data: source must be "dictionary" or "documents", got {source!r}'
        )
    shared = {name: getattr(pretrain, name) for name in ("row_length", "num_rows", "seed")}
    doubled = sorted(set(values) & set(shared))
    if doubled:
        raise ConfigError(f"recipe section data: {doubled} belong into section pretrain")
    return _settings(DocumentSettings, values | shared, "data")


def _settings(cls: type[_Settings], data: Mapping[str, Any], section: str) -> _Settings:
    known = {each.name for each in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - known)
    if unknown:
        raise ConfigError(f"recipe section {section}: unknown keys {unknown}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"recipe section {section}: {error}") from error
