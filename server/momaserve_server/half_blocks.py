"""Pixels as text for terminals: each character shows two of them, one above the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import lru_cache

Pixel = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""
HALF_BLOCK = "▀"
RESET = "\x1b[0m"

CUBE_LEVELS = (0, 95, 135, 175, 215, 255)
"""Of each colour in xterm's cube of 6 x 6 x 6, which begins at colour 16."""
FIRST_GREY, NUM_GREYS = 232, 24
"""xterm's greys are 8, 18, ..., 238."""


class Colors(Enum):
    """What a terminal can show."""

    NONE = "none"
    XTERM = "256 colours"
    TRUE = "24 bits"


def terminal_colors(environment: Mapping[str, str], *, is_terminal: bool) -> Colors:
    """What may be drawn there, by the names that terminals give themselves.

    https://no-color.org: NO_COLOR, set to anything, asks for none.
    """
    term = environment.get("TERM", "")
    if not is_terminal or environment.get("NO_COLOR") or term in ("", "dumb"):
        return Colors.NONE
    if environment.get("COLORTERM") in ("truecolor", "24bit") or term.endswith("-direct"):
        return Colors.TRUE
    return Colors.XTERM if "256color" in term else Colors.NONE


def half_blocks(rows: Sequence[Sequence[Pixel]], colors: Colors) -> list[str]:
    """Lines of text that show the pixels, two rows of them in each.

    Every line begins and ends with the terminal's own colours; the lower half of the last one
    keeps them if the number of rows is odd.

    Args:
        rows: pixels from the top, each row as long as the others.
        colors: TRUE or XTERM.
    """
    lines = []
    for at in range(0, len(rows), 2):
        upper_row = rows[at]
        lower_row = rows[at + 1] if at + 1 < len(rows) else [None] * len(upper_row)
        pieces: list[str] = []
        last: tuple[str, str | None] | None = None
        for upper, lower in zip(upper_row, lower_row, strict=True):
            front = _color(upper, colors)
            back = None if lower is None else _color(lower, colors)
            codes = []
            if last is None or front != last[0]:
                codes.append(f"38;{front}")
            if back is not None and (last is None or back != last[1]):
                codes.append(f"48;{back}")
            last = front, back
            pieces.append(f"\x1b[{';'.join(codes)}m{HALF_BLOCK}" if codes else HALF_BLOCK)
        lines.append("".join(pieces) + RESET)
    return lines


def fitted(width: int, height: int, columns: int, lines: int) -> tuple[int, int]:
    """The largest size in pixels, at most the picture's own, that a terminal has room for.

    Args:
        columns, lines: characters; a line has two rows of pixels.
    """
    scale = min(1.0, columns / width, 2 * lines / height)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _color(pixel: Pixel, colors: Colors) -> str:
    """What stands after 38; or 48; in an escape code."""
    if colors is Colors.TRUE:
        return "2;{};{};{}".format(*pixel)
    return f"5;{xterm_color(pixel)}"


@lru_cache(maxsize=4096)
def xterm_color(pixel: Pixel) -> int:
    """The nearest of xterm's colours 16 to 255, by squared distance."""
    cube = [min(range(6), key=lambda i: abs(CUBE_LEVELS[i] - value)) for value in pixel]
    grey = min(NUM_GREYS - 1, max(0, round((sum(pixel) / 3 - 8) / 10)))
    candidates = {
        16 + 36 * cube[0] + 6 * cube[1] + cube[2]: [CUBE_LEVELS[i] for i in cube],
        FIRST_GREY + grey: [8 + 10 * grey] * 3,
    }
    return min(
        candidates,
        key=lambda color: sum((a - b) ** 2 for a, b in zip(candidates[color], pixel, strict=True)),
    )
