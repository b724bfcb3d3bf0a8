"""`--config FILE`: options in a TOML file, by their own names.

Imports nothing heavy: it is part of reading the command line.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from momaserve.errors import ConfigError
from momaserve_server.option import Option

MODEL_SOURCE: Mapping[str, type] = {"checkpoint": str, "preset": str, "random_weights": bool}
"""What names the model is no `Option`, but may stand in a file too."""

_TOML_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a float",
    str: "a string",
    list: "an array",
    dict: "a table",
}


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """Options out of a file; flags and environment variables come before them."""

    path: Path
    values: Mapping[str, Any] = field(repr=False)  # keys of the API are among them
    """By `Option.dest`, as the command line would give them."""


def read_config_file(path: Path, options: Sequence[Option]) -> ConfigFile:
    """The options that `path` sets. What may be secret does not get into an error's message.

    Raises:
        ConfigError: it cannot be read or is no TOML, or a key is unknown, twice there or of the
            wrong type.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    by_name = {option.dest: option for option in options}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in by_name and name not in MODEL_SOURCE:
            raise ConfigError(f"{path}: unknown key {key!r}{_hint(name, by_name)}")
        if name in values:
            raise ConfigError(f"{path}: {key!r} is there twice, with - and with _")
        try:
            values[name] = _checked(by_name.get(name), value, MODEL_SOURCE.get(name, str))
        except ValueError as error:
            raise ConfigError(f"{path}: {key!r} must be {error}") from None
    return ConfigFile(path, {name: value for name, value in values.items() if value is not None})


def _hint(name: str, by_name: Mapping[str, Option]) -> str:
    near = difflib.get_close_matches(name, [*by_name, *MODEL_SOURCE], n=1)
    return f": did you mean {near[0].replace('_', '-')!r}?" if near else ""


def _checked(option: Option | None, value: Any, plain: type) -> Any:
    """`value` as the command line would give it, None for a switch that is not set.

    Raises:
        ValueError: of the wrong type; the message says what it must be.
    """
    if option is None:
        return _of_type(value, plain)
    if option.sets is not None:
        return option.sets if _of_type(value, bool) else None
    if option.repeats:
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) for item in items):
            raise ValueError("a string or an array of strings")
        return list(items)
    if option.type is int or option.type is float:
        number = _of_type(value, int if option.type is int else float)
        return option.type(number)
    text = option.type(_of_type(value, str))
    if option.choices is not None and text not in option.choices:
        raise ValueError(f"one of {', '.join(option.choices)}, not {text!r}")
    return text


def _of_type(value: Any, wanted: type) -> Any:
    is_whole = wanted is float and type(value) is int
    if type(value) is not wanted and not is_whole:  # `True` is an int to isinstance
        name = "a number" if wanted is float else _TOML_NAMES[wanted]
        raise ValueError(f"{name}, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return _TOML_NAMES.get(type(value), "a date or time")
