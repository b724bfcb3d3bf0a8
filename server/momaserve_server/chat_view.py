"""What `momaserve chat` shows of an answer: text as it comes, pictures where they grow."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from typing import TextIO

from PIL import Image

from momaserve_server.half_blocks import (
    HALF_BLOCK,
    RESET,
    Colors,
    Pixel,
    fitted,
    half_blocks,
)

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Whoever writes these to a terminal commands it: everything but tab and line break."""
MAX_PIXELS = 1 << 24
LINES_KEPT = 3
"""Lines of the terminal that a picture leaves free: for the question, the path, the prompt."""

Size = Callable[[], tuple[int, int]]
"""Columns and lines of the terminal now."""


def terminal_size() -> tuple[int, int]:
    size = shutil.get_terminal_size()
    return size.columns, size.lines


def printable(text: str) -> str:
    """A server's text, without what would command the terminal."""
    return CONTROL.sub("\ufffd", text)


def can_encode(out: TextIO) -> bool:
    """Whether `out` takes the character that pictures are drawn with."""
    try:
        HALF_BLOCK.encode(out.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


class View:
    """Writes to one text stream. Owns where the cursor is.

    Invariant: a picture is drawn over itself only while nothing was written since, and only in
    the size that it was drawn in last.
    """

    def __init__(
        self, out: TextIO, colors: Colors, *, is_terminal: bool, size: Size = terminal_size
    ) -> None:
        self._out = out
        self._colors = colors
        self._is_terminal = is_terminal
        self._size = size
        self._is_line_start = True
        self._drawn: tuple[int, tuple[int, int]] | None = None  # picture, size in pixels

    @property
    def draws(self) -> bool:
        """Whether pictures can be shown."""
        return self._colors is not Colors.NONE

    def start(self) -> None:
        """An answer begins, on a line of its own."""
        self._is_line_start, self._drawn = True, None

    def text(self, text: str) -> None:
        """Goes on where the last text ended."""
        if not text:
            return
        self._write(printable(text) if self._is_terminal else text)
        self._is_line_start = text.endswith("\n")
        self._drawn = None

    def line(self, text: str) -> None:
        """A line of its own."""
        self.end_line()
        self.text(text + "\n")

    def end_line(self) -> None:
        if not self._is_line_start:
            self.text("\n")

    def picture(self, number: int, png: bytes) -> None:
        """Draw a picture, over itself if it was the last thing written."""
        if not self.draws:
            return
        columns, lines = self._size()
        rows = pixels(png, columns - 1, lines - LINES_KEPT)
        if rows is None:
            return
        self.end_line()
        drawn = number, (len(rows[0]), len(rows))
        picture = half_blocks(rows, self._colors)
        up = f"\x1b[{len(picture)}A" if drawn == self._drawn else ""
        self._write(up + "".join(f"{line}\n" for line in picture))
        self._drawn = drawn

    def interrupted(self) -> None:
        """After an interrupt, which may have come between any two characters."""
        if self._is_terminal:
            self._write(f"{RESET if self.draws else ''}\n")
            self.start()

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def pixels(png: bytes, columns: int, lines: int) -> list[list[Pixel]] | None:
    """The picture's rows, made smaller to fit into so many characters.

    None if it is broken, or too large to be decoded for a look at it.
    """
    if columns < 1 or lines < 1:
        return None
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                return None
            image = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    size = fitted(*image.size, columns, lines)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BOX)
    data = image.tobytes()
    width, height = image.size
    values = [(data[at], data[at + 1], data[at + 2]) for at in range(0, len(data), 3)]
    return [values[row * width : (row + 1) * width] for row in range(height)]
