"""Pixels become exactly these characters, in colours that the terminal has."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momaserve_server.half_blocks import (
    CUBE_LEVELS,
    Colors,
    Pixel,
    fitted,
    half_blocks,
    terminal_colors,
    xterm_color,
)

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)


def test_two_rows_are_one_line() -> None:
    assert half_blocks([[RED], [BLUE]], Colors.TRUE) == ["\x1b[38;2;255;0;0;48;2;0;0;255m▀\x1b[0m"]


def test_colours_are_told_when_they_change() -> None:
    upper: list[Pixel] = [RED, RED, GREEN, GREEN]
    lower: list[Pixel] = [BLUE, BLUE, BLUE, BLACK]
    assert half_blocks([upper, lower], Colors.TRUE) == [
        "\x1b[38;2;255;0;0;48;2;0;0;255m▀▀\x1b[38;2;0;255;0m▀\x1b[48;2;0;0;0m▀\x1b[0m"
    ]


def test_every_line_stands_for_itself() -> None:
    """It may be scrolled to, or written over."""
    lines = half_blocks([[RED]] * 4, Colors.TRUE)
    assert lines == ["\x1b[38;2;255;0;0;48;2;255;0;0m▀\x1b[0m"] * 2


def test_an_odd_last_row_leaves_its_lower_half() -> None:
    lines = half_blocks([[RED, RED], [BLUE, BLUE], [GREEN, RED]], Colors.TRUE)
    assert lines[1] == "\x1b[38;2;0;255;0m▀\x1b[38;2;255;0;0m▀\x1b[0m"
    assert half_blocks([[RED]], Colors.XTERM) == ["\x1b[38;5;196m▀\x1b[0m"]


def test_nothing() -> None:
    assert half_blocks([], Colors.TRUE) == []


def test_256_colours() -> None:
    assert half_blocks([[RED, (8, 8, 8)], [BLUE, BLACK]], Colors.XTERM) == [
        "\x1b[38;5;196;48;5;21m▀\x1b[38;5;232;48;5;16m▀\x1b[0m"
    ]


XTERM: dict[int, Pixel] = {
    16 + 36 * r + 6 * g + b: (CUBE_LEVELS[r], CUBE_LEVELS[g], CUBE_LEVELS[b])
    for r in range(6)
    for g in range(6)
    for b in range(6)
} | {232 + i: (8 + 10 * i, 8 + 10 * i, 8 + 10 * i) for i in range(24)}


def distance(one: Pixel, other: Pixel) -> int:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_no_colour_of_xterms_is_nearer(pixel: Pixel) -> None:
    least = min(distance(pixel, color) for color in XTERM.values())
    assert distance(pixel, XTERM[xterm_color(pixel)]) == least


@pytest.mark.parametrize(
    ("environment", "colors"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, Colors.TRUE),
        ({"TERM": "xterm", "COLORTERM": "24bit"}, Colors.TRUE),
        ({"TERM": "xterm-direct"}, Colors.TRUE),
        ({"TERM": "screen-256color"}, Colors.XTERM),
        ({"TERM": "xterm-256color", "COLORTERM": "yes"}, Colors.XTERM),
        ({"TERM": "xterm"}, Colors.NONE),
        ({"TERM": "vt100"}, Colors.NONE),
        ({"TERM": "dumb", "COLORTERM": "truecolor"}, Colors.NONE),
        ({"COLORTERM": "truecolor"}, Colors.NONE),
        ({}, Colors.NONE),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, Colors.NONE),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, Colors.XTERM),
    ],
)
def test_terminals(environment: dict[str, str], colors: Colors) -> None:
    assert terminal_colors(environment, is_terminal=True) is colors
    assert terminal_colors(environment, is_terminal=False) is Colors.NONE


@pytest.mark.parametrize(
    ("size", "room", "expected"),
    [
        ((64, 64), (80, 32), (64, 64)),  # never larger than it is
        ((64, 64), (79, 21), (42, 42)),
        ((64, 64), (20, 50), (20, 20)),
        ((100, 10), (50, 50), (50, 5)),
        ((1000, 1), (10, 10), (10, 1)),
        ((1, 1000), (10, 10), (1, 20)),
    ],
)
def test_pictures_fit(
    size: tuple[int, int], room: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fitted(*size, *room) == expected
