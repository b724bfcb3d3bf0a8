"""Lines of JSON: the three forms, and every reason to leave a line out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from momaserve.tokens.prompt import TextPart
from momaserve.training.documents import json_lines, record
from momaserve.training.documents.json_lines import read_json_lines
from momaserve.training.documents.record import PicturePart, Record, Skipped, Turn
from tests.training.documents.factory import (
    data_url,
    image_part,
    message,
    png,
    reason_of,
    record_of,
    text_part,
    write,
    write_lines,
)


def read(folder: Path, *lines: Any) -> list[Record | Skipped]:
    return list(read_json_lines(write_lines(folder / "data.jsonl", *lines), "data.jsonl"))


def test_text(tmp_path: Path) -> None:
    found = read(tmp_path, {"text": " as it is\n"}, b"", b"   ", {"text": "second"})
    assert found == [
        Record("data.jsonl:1", (Turn(None, (TextPart(" as it is\n"),)),)),
        Record("data.jsonl:4", (Turn(None, (TextPart("second"),)),)),
    ]


def test_parts_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "pictures/a.png", png())
    parts = [
        text_part("one"),
        image_part("pictures/a.png"),
        text_part("\n"),
        image_part(data_url(png())),
    ]
    (found,) = read(tmp_path, {"parts": parts})
    turn = Turn(None, (TextPart("one"), PicturePart(path), TextPart("\n"), PicturePart(png())))
    assert record_of(found).turns == (turn,)
    assert not record_of(found).is_chat


def test_messages(tmp_path: Path) -> None:
    messages = [
        message("system", "be brief"),
        message("user", [image_part(data_url(png())), text_part("what is it?")]),
        message("assistant", "an apple"),
    ]
    (found,) = read(tmp_path, {"messages": messages})
    assert record_of(found).is_chat
    assert record_of(found).turns == (
        Turn("system", (TextPart("be brief"),)),
        Turn("user", (PicturePart(png()), TextPart("what is it?"))),
        Turn("assistant", (TextPart("an apple"),)),
    )


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (found,) = read(tmp_path, b'\xef\xbb\xbf{"text": "x"}')
    assert record_of(found).texts == ["x"]


USER, ANSWER = message("user", "hello"), message("assistant", "hi")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"text": ""}, record.EMPTY_TEXT),
        ({"text": " \n\t\u00a0"}, record.EMPTY_TEXT),
        ({"parts": []}, record.EMPTY_TEXT),
        ({"parts": [text_part(""), text_part(" ")]}, record.EMPTY_TEXT),
        ({"messages": [message("user", " "), ANSWER]}, record.EMPTY_TEXT),
        ({"messages": [USER, message("assistant", [])]}, record.EMPTY_TEXT),
        (b'{"text": "\xff"}', record.INVALID_UTF8),
        ({"text": "half \ud83d"}, json_lines.NOT_UNICODE),
        (b'{"text": "x"', json_lines.INVALID_JSON),
        (b"[" * 100_000, json_lines.INVALID_JSON),
        (b'{"text": ' + b"1" * 5000 + b"}", json_lines.INVALID_JSON),
        ([1], record.WRONG_SHAPE),
        ("text", record.WRONG_SHAPE),
        (None, record.WRONG_SHAPE),
        ({}, record.WRONG_SHAPE),
        ({"text": 3}, record.WRONG_SHAPE),
        ({"text": "x", "parts": []}, record.WRONG_SHAPE),
        ({"parts": "x"}, record.WRONG_SHAPE),
        ({"parts": ["x"]}, record.WRONG_SHAPE),
        ({"parts": [{"type": "video"}]}, record.WRONG_SHAPE),
        ({"parts": [{"type": "image"}]}, record.WRONG_SHAPE),
        ({"messages": []}, record.WRONG_SHAPE),
        ({"messages": [3]}, record.WRONG_SHAPE),
        ({"messages": [message("tool", "x"), ANSWER]}, record.WRONG_SHAPE),
        ({"messages": [message(["user"], "x"), ANSWER]}, record.WRONG_SHAPE),
        ({"messages": [{"role": "user"}, ANSWER]}, record.WRONG_SHAPE),
        ({"messages": [USER]}, record.NO_ANSWER),
        ({"messages": [USER, ANSWER, USER]}, record.NO_ANSWER),
        ({"text": "x", "id": 7}, json_lines.UNKNOWN_KEY),
        ({"parts": [{**text_part("x"), "lang": "en"}]}, json_lines.UNKNOWN_KEY),
        ({"messages": [{**USER, "name": "Ada"}, ANSWER]}, json_lines.UNKNOWN_KEY),
        ({"parts": [image_part("none.png")]}, record.UNREADABLE),
        ({"parts": [image_part("folder")]}, record.UNREADABLE),
        ({"parts": [image_part("nul\0.png")]}, record.UNREADABLE),
        ({"parts": [image_part("n" * 5000)]}, record.UNREADABLE),
        ({"parts": [image_part("../outside.png")]}, record.OUTSIDE),
        ({"parts": [image_part("link.png")]}, record.OUTSIDE),
        ({"parts": [image_part("/")]}, record.OUTSIDE),
        ({"parts": [image_part("http://example.org/a.png")]}, json_lines.NO_URL),
        ({"parts": [image_part("file:///a.png")]}, json_lines.NO_URL),
        ({"parts": [image_part("data:text/html;base64,aa")]}, json_lines.BAD_DATA_URL),
        ({"parts": [image_part("data:image/png,aa")]}, json_lines.BAD_DATA_URL),
        ({"parts": [image_part("data:image/png;base64,a*")]}, json_lines.BAD_DATA_URL),
    ],
    ids=lambda value: str(value)[:40] if not isinstance(value, str) else "",
)
def test_what_is_skipped_and_why(tmp_path: Path, line: Any, reason: str) -> None:
    folder = tmp_path / "data"
    write(tmp_path / "outside.png", png())
    (folder / "folder").mkdir(parents=True)
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    bad, good = read(folder, line, {"text": "the next line is read"})
    assert reason_of(bad) == reason
    assert isinstance(bad, Skipped) and bad.where == "data.jsonl:1"
    assert record_of(good).texts == ["the next line is read"]


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "deep/a.png", png())
    (tmp_path / "b.png").symlink_to(tmp_path / "deep/a.png")
    (found,) = read(tmp_path, {"parts": [image_part("b.png")]})
    assert record_of(found).pictures == [PicturePart(tmp_path.resolve() / "deep/a.png")]


def test_a_line_that_is_too_large_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_TEXT_BYTES", 100)
    texts = ["a", "b" * 250, "c" * 87, "d" * 88, "e"]  # a line has 13 bytes more
    found = read(tmp_path, *({"text": text} for text in texts))
    kept = [record_of(each).texts[0][0] for each in found if isinstance(each, Record)]
    assert kept == ["a", "c", "e"]
    assert [each.where for each in found if isinstance(each, Skipped)] == [
        "data.jsonl:2",
        "data.jsonl:4",
    ]
    assert {reason_of(each) for each in (found[1], found[3])} == {record.TOO_LARGE}


def test_pictures_that_lines_name_are_gathered_used_or_not(tmp_path: Path) -> None:
    used, unused = write(tmp_path / "used.png", png()), write(tmp_path / "unused.png", png())
    lines = [{"parts": [image_part("used.png")]}, {"parts": [image_part("unused.png")], "id": 1}]
    mentioned: set[Path] = set()
    path = write_lines(tmp_path / "data.jsonl", *lines)
    assert len(list(read_json_lines(path, "data.jsonl", mentioned))) == 2
    assert mentioned == {used.resolve(), unused.resolve()}
