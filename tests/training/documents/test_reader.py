"""Folders: what belongs together, what is left out, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from momaserve.errors import DataError
from momaserve.tokens.prompt import TextPart
from momaserve.training.documents import record
from momaserve.training.documents.reader import LINKED_FOLDER, OTHER_KIND, printable, read_records
from momaserve.training.documents.record import PicturePart, Record, Skipped
from tests.training.documents.factory import image_part, png, text_part, write, write_lines


def by_place(path: Path, seed: int = 0) -> dict[str, Record | Skipped]:
    found = list(read_records(path, seed))
    assert len({each.where for each in found}) == len(found)
    return {each.where: each for each in found}


def kinds(found: Record | Skipped) -> list[str]:
    assert isinstance(found, Record), found
    (turn,) = found.turns
    return ["words" if isinstance(part, TextPart) else "picture" for part in turn.parts]


def test_a_folder_holds_lines_pairs_texts_and_pictures(tmp_path: Path) -> None:
    write_lines(tmp_path / "z/lines.jsonl", {"text": "one"}, {"text": "two"})
    write_lines(tmp_path / "b.JSONL", {"text": "three"})
    write(tmp_path / "cat.txt", "a cat\r\non a mat\n")
    write(tmp_path / "cat.PNG", png())
    write(tmp_path / "note.txt", "\ufeff only words \n")
    write(tmp_path / "alone.webp", png())
    found = by_place(tmp_path)
    assert list(found) == [
        "b.JSONL:1",
        "z/lines.jsonl:1",
        "z/lines.jsonl:2",
        "alone.webp",
        "cat.PNG",
        "note.txt",
    ]
    assert sorted(kinds(found["cat.PNG"])) == ["picture", "words"]
    assert kinds(found["alone.webp"]) == ["picture"]
    texts = [each.texts for each in found.values() if isinstance(each, Record)]
    assert texts == [["three"], ["one"], ["two"], [], ["a cat\non a mat"], ["only words"]]


def test_names_pair_within_one_folder_only(tmp_path: Path) -> None:
    write(tmp_path / "a/x.txt", "words")
    write(tmp_path / "b/x.png", png())
    write(tmp_path / "c/y.z.txt", "words")
    write(tmp_path / "c/y.z.jpg", png())
    write(tmp_path / "c/y.png", png())
    found = by_place(tmp_path)
    assert {place: len(kinds(each)) for place, each in found.items()} == {
        "a/x.txt": 1,
        "b/x.png": 1,
        "c/y.png": 1,
        "c/y.z.jpg": 2,
    }


def test_the_coin_is_fair_and_of_the_seed(tmp_path: Path) -> None:
    for number in range(100):
        write(tmp_path / f"{number}.txt", "words")
        write(tmp_path / f"{number}.png", b"not opened yet")
    orders = [[kinds(each)[0] for each in read_records(tmp_path, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert 30 < orders[0].count("words") < 70


def test_pictures_that_a_line_names_are_no_documents_of_their_own(tmp_path: Path) -> None:
    for name in ("used", "refused", "loose"):
        write(tmp_path / f"pictures/{name}.png", png())
    parts = [text_part("see"), image_part("pictures/used.png")]
    refused = {"parts": [image_part("pictures/refused.png")], "id": 3}
    write_lines(tmp_path / "data.jsonl", {"parts": parts}, refused)
    assert list(by_place(tmp_path)) == ["data.jsonl:1", "data.jsonl:2", "pictures/loose.png"]


def test_files_that_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    outside = write(tmp_path / "secret.txt", "secret")
    lines = write_lines(tmp_path / "secret.jsonl", {"text": "secret"})
    write(folder / "table.csv", "1,2")
    write(folder / "picture.tiff", png())
    write(folder / "empty.txt", " \n")
    write(folder / "latin.txt", b"caf\xe9")
    write(folder / "pair.txt", "")
    write(folder / "pair.png", png())
    write(folder / "large.txt", "x" * 101)
    write(folder / ".hidden.txt", "hidden")
    write(folder / ".git/config.txt", "hidden")
    (folder / "link.txt").symlink_to(outside)
    (folder / "link.jsonl").symlink_to(lines)
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    write(tmp_path / "elsewhere/a.txt", "secret")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "pipe.txt")
    monkeypatch.setattr("momaserve.training.documents.reader.MAX_TEXT_BYTES", 100)
    found = by_place(folder)
    reasons = {place: each.reason for place, each in found.items() if isinstance(each, Skipped)}
    assert len(reasons) == len(found)
    assert reasons == {
        "table.csv": OTHER_KIND,
        "picture.tiff": OTHER_KIND,
        "empty.txt": record.EMPTY_TEXT,
        "latin.txt": record.INVALID_UTF8,
        "pair.png": record.EMPTY_TEXT,
        "large.txt": record.TOO_LARGE,
        "link.txt": record.OUTSIDE,
        "link.jsonl": record.OUTSIDE,
        "gone.txt": record.UNREADABLE,
        "circle.png": record.UNREADABLE,
        "pipe.txt": record.UNREADABLE,
        "linked": LINKED_FOLDER,
    }


def test_a_folder_may_be_named_by_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real/a.png", png())
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (found,) = read_records(tmp_path / "link")
    assert isinstance(found, Record)
    assert found.pictures == [PicturePart((tmp_path / "real/a.png").resolve())]


@pytest.mark.parametrize("name", ["missing", "words.txt"])
def test_what_is_no_data_set_is_refused_at_once(tmp_path: Path, name: str) -> None:
    write(tmp_path / "words.txt", "x")
    with pytest.raises(DataError, match=name):
        read_records(tmp_path / name)


def test_names_of_any_bytes_can_be_shown() -> None:
    assert printable(os.fsdecode(b"caf\xe9\n\x1b[31m.txt")) == "caf\\xe9??[31m.txt"


def test_a_folder_reads_the_same_each_time(tmp_path: Path) -> None:
    for name in ("b/x", "a", "c", "b-x"):
        write(tmp_path / f"{name}.txt", name)
    places = list(by_place(tmp_path))
    assert places == ["a.txt", "b-x.txt", "b/x.txt", "c.txt"] == list(by_place(tmp_path))
