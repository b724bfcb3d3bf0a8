"""A data set of a user -> records, one after another, and what was left out and why.

A data set is one JSON-lines file, or a folder of JSON-lines files, texts and pictures. Whatever is
in it, reading it raises nothing but for a path that is no data set at all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from momaserve.errors import DataError
from momaserve.tokens.prompt import TextPart
from momaserve.training.documents.json_lines import read_json_lines
from momaserve.training.documents.record import (
    EMPTY_TEXT,
    MAX_TEXT_BYTES,
    TOO_LARGE,
    UNREADABLE,
    PicturePart,
    Record,
    Skipped,
    Turn,
    UnusableError,
    decode_text,
    path_inside,
    read_at_most,
)

LINES, WORDS = ".jsonl", ".txt"
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"})
OTHER_KIND = "the file is of no kind that is read (.jsonl, .txt, pictures)"

LINKED_FOLDER = "links to folders are not followed"


def read_records(path: Path, seed: int = 0) -> Iterator[Record | Skipped]:
    """Everything in a data set, always in the same order.

    Of a folder first every `.jsonl` below it, then the loose files: `NAME.txt` beside `NAME.png`
    (or another picture) is one document of words and picture, in the order that a coin of `seed`
    and the file's name gives; other texts, and pictures that no line of a `.jsonl` names, are
    documents of their own. Files and folders whose names begin with a dot are no data.

    Raises:
        DataError: there is nothing at `path`, or it is neither a folder nor a `.jsonl` file.
    """
    if path.is_dir():
        return _read_folder(path.resolve(), seed)
    if not path.is_file():
        raise DataError(f"there is no data at {path}")
    if path.suffix.lower() != LINES:
        raise DataError(f"{path} is neither a folder nor a .jsonl file")
    return read_json_lines(path, printable(path.name))


def printable(name: str) -> str:
    """A file's name as it can be stored and shown, whatever bytes it is made of."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else "?" for char in text)


def _read_folder(root: Path, seed: int) -> Iterator[Record | Skipped]:
    files: list[Path] = []
    linked: list[Path] = []
    unreadable: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        linked += [path for name in folders if (path := Path(folder, name)).is_symlink()]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    for error in unreadable:
        yield Skipped(printable(str(error.filename or root)), UNREADABLE, type(error).__name__)
    for path in sorted(linked):
        yield Skipped(_name(path, root), LINKED_FOLDER)
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    mentioned: set[Path] = set()
    for path in files:
        if path.suffix.lower() == LINES:
            yield from _read_if_inside(root, path, mentioned)
    words = {path.with_suffix(""): path for path in files if path.suffix.lower() == WORDS}
    paired = {path.with_suffix("") for path in files if path.suffix.lower() in PICTURES}
    for path in files:
        kind, stem = path.suffix.lower(), path.with_suffix("")
        if kind == LINES or (kind == WORDS and stem in paired):
            continue
        where = _name(path, root)
        try:
            if kind == WORDS:
                yield Record(where, (Turn(None, (_words(root, path),)),))
            elif kind not in PICTURES:
                yield Skipped(where, OTHER_KIND)
            elif stem in words:
                yield Record(where, (Turn(None, _pair(root, path, words[stem], seed)),))
            elif (inside := path_inside(root, path)) not in mentioned:
                yield Record(where, (Turn(None, (PicturePart(inside),)),))
        except UnusableError as error:
            yield Skipped(where, error.reason, error.detail)


def _read_if_inside(root: Path, path: Path, mentioned: set[Path]) -> Iterator[Record | Skipped]:
    try:
        path_inside(root, path)
    except UnusableError as error:
        yield Skipped(_name(path, root), error.reason, error.detail)
    else:
        yield from read_json_lines(path, _name(path, root), mentioned)


def _name(path: Path, root: Path) -> str:
    return printable(path.relative_to(root).as_posix())


def _words(root: Path, path: Path) -> TextPart:
    """What a text file says, without the white space that editors leave around it."""
    data = read_at_most(path_inside(root, path), MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise UnusableError(TOO_LARGE, f"a text may have at most {MAX_TEXT_BYTES} bytes")
    text = decode_text(data).replace("\r\n", "\n").strip()
    if not text:
        raise UnusableError(EMPTY_TEXT)
    return TextPart(text)


def _pair(
    root: Path, picture: Path, words: Path, seed: int
) -> tuple[TextPart | PicturePart, TextPart | PicturePart]:
    text, image = _words(root, words), PicturePart(path_inside(root, picture))
    name = os.fsencode(picture.relative_to(root).as_posix())
    is_heads = hashlib.sha256(b"%d/%s" % (seed, name)).digest()[0] % 2 == 0
    return (text, image) if is_heads else (image, text)
