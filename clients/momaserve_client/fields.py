"""Typed looks into JSON. Each raises TypeError or KeyError, which become BadReplyError."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from momaserve_client.images import Png, media_type

Json = Mapping[str, Any]
Item = TypeVar("Item")


def as_object(value: Any) -> Json:
    if not isinstance(value, Mapping):
        raise TypeError(f"expected an object, got {_kind(value)}")
    return value


def as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {_kind(value)}")
    return value


def as_count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected a whole number, got {_kind(value)}")
    return value


def as_number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"expected a number, got {_kind(value)}")
    return float(value)


def as_list(value: Any) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {_kind(value)}")
    return value


def as_png(value: Any) -> Png:
    """A PNG file in base64."""
    data = base64.b64decode(as_text(value), validate=True)
    if media_type(data) != "image/png":
        raise TypeError("expected a PNG picture")
    return Png(data)


def many(value: Any, read: Callable[[Any], Item]) -> tuple[Item, ...]:
    """A list, item by item."""
    return tuple(read(item) for item in as_list(value))


def maybe(value: Any, read: Callable[[Any], Item]) -> Item | None:
    return None if value is None else read(value)


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
