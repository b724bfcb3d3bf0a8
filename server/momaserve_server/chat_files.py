"""Files of `momaserve chat`: pictures in, pictures and conversations out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from momaserve.errors import MomaserveError

MAX_STEM_CHARS = 40
DEFAULT_STEM = "picture"


class FileError(MomaserveError):
    """A file cannot be read or written; names it."""

    def __init__(self, path: Path, error: OSError | str) -> None:
        reason = error if isinstance(error, str) else error.strerror or str(error)
        super().__init__(f"{path}: {reason}")


def read_picture(path: Path, max_bytes: int) -> bytes:
    """Raises FileError for a file that cannot be read, or has more than `max_bytes`."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise FileError(path, error if isinstance(error, OSError) else str(error)) from None
    if len(data) > max_bytes:
        raise FileError(path, f"a picture may have at most {max_bytes} bytes")
    return data


def stem_of(prompt: str) -> str:
    """What a picture's file is called, by the words that asked for it."""
    words = re.sub(r"[\W_]+", "-", prompt.lower())[:MAX_STEM_CHARS].strip("-")
    return words or DEFAULT_STEM


def save_new(data: bytes, directory: Path, stem: str, suffix: str = ".png") -> Path:
    """Write a file under the first name that is free: stem.png, stem-2.png and so on.

    It appears whole, and nothing that is there is overwritten, whoever else writes meanwhile:
    the name is taken before the file moves to it.

    Raises:
        FileError: it cannot be written.
    """
    partial = directory / f".{stem}.{os.getpid()}.tmp"
    try:
        partial.write_bytes(data)
        for number in count(1):
            name = f"{stem}{suffix}" if number == 1 else f"{stem}-{number}{suffix}"
            if _moved(partial, directory / name):
                return directory / name
        raise AssertionError("there is always a larger number")
    except OSError as error:
        raise FileError(directory / f"{stem}{suffix}", error) from None
    finally:
        partial.unlink(missing_ok=True)


def _moved(partial: Path, path: Path) -> bool:
    """False if there is a file of that name."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    try:
        partial.replace(path)
    except BaseException:
        path.unlink()
        raise
    return True


def save_conversation(conversation: Mapping[str, Any], path: Path) -> None:
    """Write JSON to a new file.

    Raises:
        FileError: it cannot be written, or there is one of that name.
    """
    data = json.dumps(conversation, ensure_ascii=False, indent=2).encode() + b"\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data)
        if not _moved(partial, path):
            raise FileError(path, "there is a file of that name")
    except OSError as error:
        raise FileError(path, error) from None
    finally:
        partial.unlink(missing_ok=True)
