"""JSON-lines files: one record a line, in one of three forms, and nothing else in it.

    {"text": "..."}
    {"parts": [{"type": "text", "text": "..."}, {"type": "image", "path": "pictures/a.png"}, ...]}
    {"messages": [{"role": "user" | "assistant" | "system", "content": "..." or parts}, ...]}

`path` is relative to the file and stays below its folder, or is a `data:image/...;base64,...` URL.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from momaserve.tokens.prompt import ROLES, TextPart
from momaserve.training.documents.record import (
    EMPTY_TEXT,
    MAX_TEXT_BYTES,
    NO_ANSWER,
    TOO_LARGE,
    UNREADABLE,
    WRONG_SHAPE,
    PicturePart,
    Record,
    Skipped,
    Turn,
    UnusableError,
    decode_text,
    path_inside,
)

INVALID_JSON = "the line is not valid JSON"
UNKNOWN_KEY = "the record has a key that is not known"
NO_URL = "pictures are not fetched: give a path or a data: URL"
BAD_DATA_URL = "the data: URL is not of the form data:image/...;base64,..."
NOT_UNICODE = "the text is not valid Unicode (half of a surrogate pair)"

_FORMS = ("text", "parts", "messages")


def read_json_lines(
    path: Path, name: str, mentioned: set[Path] | None = None
) -> Iterator[Record | Skipped]:
    """The records of a file; blank lines are none.

    Args:
        name: how places in the file are called.
        mentioned: gathers the picture files that any line names, used or not.
    """
    folder = path.parent.resolve()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                where = f"{name}:{number}"
                if line is not None and not line.strip():
                    continue
                try:
                    value = _parse(line)
                    if mentioned is not None:
                        mentioned.update(_picture_files(value, folder))
                    yield Record(where, _turns(value, folder))
                except UnusableError as error:
                    yield Skipped(where, error.reason, error.detail)
    except OSError as error:
        yield Skipped(name, UNREADABLE, type(error).__name__)


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines; None for one that is too large to be held."""
    while line := file.readline(MAX_TEXT_BYTES + 1):
        if len(line) <= MAX_TEXT_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_TEXT_BYTES)
        yield None


def _parse(line: bytes | None) -> Any:
    if line is None:
        raise UnusableError(TOO_LARGE, f"a line may have at most {MAX_TEXT_BYTES} bytes")
    text = decode_text(line).rstrip()
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UnusableError(INVALID_JSON, f"column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise UnusableError(INVALID_JSON, type(error).__name__) from error


def _picture_files(value: Any, folder: Path) -> Iterator[Path]:
    """Files under any key `path`, so that those of a skipped record count as its own too."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            name = value.get("path")
            if isinstance(name, str) and not _is_url(name):
                try:
                    yield path_inside(folder, name)
                except UnusableError:
                    continue


def _turns(value: Any, folder: Path) -> tuple[Turn, ...]:
    if not isinstance(value, dict):
        raise UnusableError(WRONG_SHAPE, f"an object is needed, got {type(value).__name__}")
    _check_keys(value, _FORMS)
    if len(value) != 1:
        raise UnusableError(WRONG_SHAPE, f"exactly one of {', '.join(_FORMS)} is needed")
    if "messages" in value:
        return _messages(value["messages"], folder)
    if "text" in value:
        turn = Turn(None, (TextPart(_string(value["text"], "text")),))
    else:
        turn = Turn(None, _parts(value["parts"], folder))
    _check_content(turn)
    return (turn,)


def _messages(messages: Any, folder: Path) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise UnusableError(WRONG_SHAPE, "messages must be a list that is not empty")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise UnusableError(WRONG_SHAPE, "a message must be an object")
        _check_keys(message, ("role", "content"))
        if message.get("role") not in ROLES:
            raise UnusableError(WRONG_SHAPE, f"role must be one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            turn = Turn(message["role"], (TextPart(_string(content, "content")),))
        else:
            turn = Turn(message["role"], _parts(content, folder))
        _check_content(turn)
        turns.append(turn)
    if turns[-1].role != "assistant":
        raise UnusableError(NO_ANSWER)
    return tuple(turns)


def _parts(parts: Any, folder: Path) -> tuple[TextPart | PicturePart, ...]:
    if not isinstance(parts, list):
        raise UnusableError(WRONG_SHAPE, "parts and content must be lists of parts")
    return tuple(_part(part, folder) for part in parts)


def _part(part: Any, folder: Path) -> TextPart | PicturePart:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        _check_keys(part, ("type", "text"))
        return TextPart(_string(part.get("text"), "text"))
    if kind == "image":
        _check_keys(part, ("type", "path"))
        return _picture(_string(part.get("path"), "path"), folder)
    raise UnusableError(WRONG_SHAPE, "a part must be an object of type text or image")


def _picture(name: str, folder: Path) -> PicturePart:
    if not _is_url(name):
        return PicturePart(path_inside(folder, name))
    head, comma, payload = name.partition(",")
    if not head.lower().startswith("data:"):
        raise UnusableError(NO_URL)
    if not comma or not head.lower().startswith("data:image/") or not head.endswith(";base64"):
        raise UnusableError(BAD_DATA_URL)
    try:
        return PicturePart(base64.b64decode(payload, validate=True))
    except (binascii.Error, ValueError) as error:
        raise UnusableError(BAD_DATA_URL, "its data is not base64") from error


def _is_url(name: str) -> bool:
    return name[:5].lower() == "data:" or "://" in name[:16]


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise UnusableError(WRONG_SHAPE, f"{key} must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UnusableError(NOT_UNICODE, f"character {error.start}") from error
    return value


def _check_keys(value: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise UnusableError(UNKNOWN_KEY, ", ".join(ascii(key)[:40] for key in unknown[:3]))


def _check_content(turn: Turn) -> None:
    """White space beside a picture is content of its own; alone it is nothing to learn."""
    if all(isinstance(part, TextPart) and not part.text.strip() for part in turn.parts):
        raise UnusableError(EMPTY_TEXT)
