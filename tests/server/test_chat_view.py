"""What a terminal shows of an answer; `pyte` is the terminal."""

from __future__ import annotations

import io

import pyte
import pytest
from PIL import Image

from momaserve_server.chat_view import View, can_encode, pixels
from momaserve_server.half_blocks import Colors


def png(color: str, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


class Looked:
    """A view and what it put on the screen."""

    def __init__(self, colors: Colors = Colors.TRUE, *, is_terminal: bool = True) -> None:
        self.out = io.StringIO()
        self.size = (20, 10)
        self.view = View(self.out, colors, is_terminal=is_terminal, size=lambda: self.size)

    def screen(self) -> pyte.Screen:
        screen = pyte.Screen(*self.size)
        pyte.Stream(screen).feed(self.out.getvalue().replace("\n", "\r\n"))
        return screen

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen().display if line.strip()]


def test_text_goes_on_where_it_ended() -> None:
    looked = Looked()
    for text in ("a", "", "b\nc"):
        looked.view.text(text)
    looked.view.line("d")
    looked.view.line("e")
    assert looked.lines() == ["ab", "c", "d", "e"]


def test_a_picture_grows_in_place() -> None:
    looked = Looked()
    looked.view.text("look:")
    for color in ("white", "red"):
        looked.view.picture(0, png(color))
    looked.view.text("there")
    assert looked.lines() == ["look:", "▀▀▀▀", "▀▀▀▀", "there"]
    assert looked.screen().buffer[1][0].fg == "ff0000"


def test_pictures_stand_side_by_side_with_nothing_drawn_over() -> None:
    looked = Looked()
    looked.view.picture(0, png("red", (2, 2)))
    looked.view.picture(1, png("blue", (2, 2)))
    looked.view.picture(1, png("lime", (2, 2)))
    looked.view.text("text\n")
    looked.view.picture(1, png("blue", (2, 2)))
    looked.view.start()
    looked.view.picture(1, png("red", (2, 2)))
    assert looked.lines() == ["▀▀", "▀▀", "text", "▀▀", "▀▀"]
    buffer = looked.screen().buffer
    assert [buffer[row][0].fg for row in (0, 1, 3, 4)] == ["ff0000", "00ff00", "0000ff", "ff0000"]


def test_a_picture_is_made_small_enough_to_be_drawn_over() -> None:
    looked = Looked()
    for color in ("white", "red"):
        looked.view.picture(0, png(color, (64, 64)))
    looked.view.line("end")
    assert looked.lines() == ["▀" * 14] * 7 + ["end"]


def test_a_terminal_that_changes_its_size() -> None:
    looked = Looked()
    looked.view.picture(0, png("white", (64, 64)))
    looked.size = (20, 6)
    looked.view.picture(0, png("red", (64, 64)))
    assert "\x1b[7A" not in looked.out.getvalue()
    assert "\x1b[3A" not in looked.out.getvalue()
    looked.size = (1, 1)
    before = looked.out.getvalue()
    looked.view.picture(0, png("red", (64, 64)))
    assert looked.out.getvalue() == before


def test_no_colours_no_pictures() -> None:
    looked = Looked(Colors.NONE)
    looked.view.picture(0, png("red"))
    looked.view.text("a")
    looked.view.picture(0, png("red"))
    looked.view.text("b")
    assert looked.out.getvalue() == "ab"
    assert not looked.view.draws


@pytest.mark.parametrize(
    "broken",
    [b"", b"\x89PNG\r\n\x1a\n", png("red")[:50], b"GIF89a", png("red", (1 << 12, 1 + (1 << 12)))],
    ids=["empty", "signature", "half", "gif", "huge"],
)
def test_broken_pictures_are_not_drawn(broken: bytes) -> None:
    looked = Looked()
    looked.view.picture(0, broken)
    assert looked.out.getvalue() == ""


def test_pixels() -> None:
    image = Image.new("RGBA", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255, 255))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    assert pixels(buffer.getvalue(), 10, 10) == [[(255, 0, 0), (0, 0, 255)]]


CONTROLS = "\x1b[2Ja\rb\x07c\x9bd\x7fe\tf\n"


def test_a_terminal_takes_no_orders_from_the_server() -> None:
    looked = Looked()
    looked.view.text(CONTROLS)
    assert looked.out.getvalue() == "\ufffd[2Ja\ufffdb\ufffdc\ufffdd\ufffde\tf\n"
    piped = Looked(is_terminal=False)
    piped.view.text(CONTROLS)  # the program that reads it wants what was said
    assert piped.out.getvalue() == CONTROLS


def test_after_an_interrupt_colours_are_the_terminals_own() -> None:
    looked = Looked()
    looked.out.write("\x1b[38;2;255;0;0m▀")
    looked.view.interrupted()
    looked.view.line("stopped")
    assert looked.lines() == ["▀", "stopped"]
    assert looked.screen().buffer[1][0].fg == "default"
    piped = Looked(Colors.NONE, is_terminal=False)
    piped.view.interrupted()
    assert piped.out.getvalue() == ""


def test_encodings() -> None:
    assert can_encode(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert not can_encode(io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
