"""One command-line option: its flag, its environment variable and the field that it sets.

Imports nothing heavy: `--help` must be quick.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

ENVIRONMENT_PREFIX = "MOMASERVE_"
SWITCH_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
"""What the environment variable of an option without value may hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One command-line option that sets one field of a configuration class."""

    flag: str
    owner: type
    """The dataclass whose default is the option's."""
    help: str
    """Without the default, with the unit."""
    field: str = ""
    """Field of `owner`; left out, the flag's own name."""
    type: Callable[[str], Any] = int
    choices: Sequence[str] | None = None
    metavar: str = ""
    """What stands for the value in the help; left out, N or NAME."""
    unset: str = "automatic"
    """What the help shows for a default that is None or empty."""
    sets: bool | None = None
    """What the bare flag sets the field to; None for an option that takes a value."""
    repeats: bool = False
    """Whether it may be given several times, and its field is a tuple of the values."""

    @property
    def dest(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def target(self) -> str:
        return self.field or self.dest

    @property
    def environment_name(self) -> str:
        return ENVIRONMENT_PREFIX + self.dest.upper()

    def default_text(self) -> str:
        if self.sets is not None:
            return "off"
        default = next(f.default for f in fields(self.owner) if f.name == self.target)
        return self.unset if default in (None, MISSING, (), "") else str(default)

    def from_environment(self, text: str) -> Any:
        """The value that `text` of its environment variable stands for.

        Raises:
            ValueError: it stands for none; the message names the variable.
        """
        name = self.environment_name
        if self.sets is not None:
            if text.lower() not in SWITCH_WORDS:
                raise ValueError(f"{name}={text!r} is not one of {', '.join(SWITCH_WORDS)}")
            return self.sets if SWITCH_WORDS[text.lower()] else not self.sets
        if self.repeats:  # may be secret: no value goes into the message
            items = [item.strip() for item in text.split(",")]
            if not all(items):
                raise ValueError(f"{name}: nothing stands between two commas")
            return items
        try:
            value = self.type(text)
        except ValueError:
            raise ValueError(f"{name}={text!r} is not a valid {self.type.__name__}") from None
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{name}={text!r} is not one of {', '.join(self.choices)}")
        return value

    def add_to(self, group: argparse._ArgumentGroup, default: Any) -> None:
        """Adds the flag; `default` is what the environment says, or None."""
        kind: dict[str, Any]
        if self.sets is not None:
            kind = {"action": "store_const", "const": self.sets}
        else:
            metavar = self.metavar or ("N" if self.type is not str else "NAME")
            kind = {
                "action": _Repeated if self.repeats else "store",
                "type": self.type,
                "choices": self.choices,
                "metavar": None if self.choices else metavar,
            }
        may_repeat = "; may be given several times" if self.repeats else ""
        text = f"{self.help}{may_repeat} (default: {self.default_text()})"
        group.add_argument(self.flag, default=default, help=text, **kind)


class _Repeated(argparse.Action):
    """Collects values. The first one replaces the default, rather than joining it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        known = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [values] if known is self.default else [*known, values])
