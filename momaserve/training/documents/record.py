"""One record of a data set: who says which words and pictures. Pictures are not opened yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from momaserve.errors import DataError
from momaserve.tokens.prompt import TextPart

EMPTY_TEXT = "the text is empty or only white space"
INVALID_UTF8 = "the text is not valid UTF-8"
UNREADABLE = "the file cannot be read"
TOO_LARGE = "the file or line is too large"
OUTSIDE = "the path leaves the folder of the data"
WRONG_SHAPE = "the record has not the shape of one"
NO_ANSWER = "the conversation does not end with the assistant's answer"

MAX_TEXT_BYTES = 64 * 2**20
"""Size of a text file, and of a line of a JSON-lines file (with pictures as `data:` URLs)."""


class UnusableError(DataError):
    """A record that cannot be learnt from; it is skipped and counted, and reading goes on."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        """The same words for all records of this kind: they are counted by it."""
        self.detail = detail


@dataclass(frozen=True, slots=True)
class PicturePart:
    """A picture as a file inside the data's folder, or the bytes of a `data:` URL."""

    source: Path | bytes

    def read(self, max_bytes: int) -> bytes:
        """The file's content, cut after `max_bytes` + 1 so that the limit's breach shows.

        Raises:
            UnusableError: the file cannot be read.
        """
        if isinstance(self.source, bytes):
            return self.source
        return read_at_most(self.source, max_bytes + 1)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says, or (`role` is None) a whole document without speakers."""

    role: str | None
    parts: tuple[TextPart | PicturePart, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """A document of one turn without a role, or a conversation in which every turn has one."""

    where: str
    """File (and line) below the data's folder."""
    turns: tuple[Turn, ...]

    @property
    def is_chat(self) -> bool:
        return self.turns[0].role is not None

    @property
    def pictures(self) -> list[PicturePart]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, PicturePart)]

    @property
    def texts(self) -> list[str]:
        return [
            part.text for turn in self.turns for part in turn.parts if isinstance(part, TextPart)
        ]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record, or a file, that was left out."""

    where: str
    reason: str
    detail: str = ""


def read_at_most(path: Path, num_bytes: int) -> bytes:
    """The first bytes of a regular file. Raises UnusableError when there are none to be had."""
    try:
        if not path.is_file():  # a pipe would block for ever
            raise UnusableError(UNREADABLE, "there is no such file")
        with path.open("rb") as file:
            return file.read(num_bytes)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UnusableError(UNREADABLE, type(error).__name__) from error


def path_inside(folder: Path, name: str | Path) -> Path:
    """The file that `name` means, wherever its links lead, if that is inside `folder` (resolved).

    Raises:
        UnusableError: it is outside, or there is no such file.
    """
    try:
        path = (folder / name).resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise UnusableError(UNREADABLE, type(error).__name__) from error
    if not path.is_relative_to(folder):
        raise UnusableError(OUTSIDE)
    if not is_file:
        raise UnusableError(UNREADABLE, "there is no such file")
    return path


def decode_text(data: bytes) -> str:
    """UTF-8 with or without a byte-order mark. Raises UnusableError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableError(INVALID_UTF8, f"byte {error.start}") from error
