"""Pictures as squares: what is refused, and what an image tokenizer is trained on."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from momaserve.errors import DataError
from momaserve.tokens.image import ImageLimits, fit_square
from momaserve.training.documents.pictures import pictures, square
from momaserve.training.documents.record import PicturePart, UnusableError
from tests.training.documents.factory import (
    BLUE,
    RED,
    SIDE,
    data_url,
    encoded,
    image_part,
    noise,
    png,
    text_part,
    write,
    write_lines,
)


def bomb() -> bytes:
    """A small file that says it has 10^10 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_kinds_of_files_are_known_by_their_content(tmp_path: Path, kind: str) -> None:
    image = Image.new("RGB", (20, 10), BLUE)
    path = write(tmp_path / "named.png", encoded(image, kind))
    pixels = square(PicturePart(path), SIDE)
    assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.array(fit_square(image, SIDE)).astype(int)).max() < 20
    assert np.array_equal(square(PicturePart(path.read_bytes()), SIDE), pixels)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (noise(0)[:-100], "broken"),
        (b"", "broken"),
        (b"only words", "broken"),
        (encoded(Image.new("RGB", (9, 9)), "TIFF"), "broken"),
        (png(size=(1, 1)), "at least 4 pixels on each side"),
        (png(size=(100, 3)), "at least 4 pixels on each side"),
        (bomb(), "at most 16777216 pixels"),
    ],
    ids=["truncated", "empty", "words", "tiff", "1x1", "thin", "bomb"],
)
def test_pictures_that_cannot_be_used(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(UnusableError) as caught:
        square(PicturePart(write(tmp_path / "a.png", data)), SIDE)
    assert reason in caught.value.reason
    assert "got" not in caught.value.reason  # or each picture would have a reason of its own


def test_no_more_of_a_file_is_read_than_may_be(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", png() + bytes(1000))
    assert len(PicturePart(path).read(500)) == 501
    with pytest.raises(UnusableError, match="at most 500 bytes"):
        square(PicturePart(path), SIDE, ImageLimits(max_bytes=500))


def test_pictures_of_a_data_set_are_different_and_split(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / f"{number}.png", noise(number))
    write(tmp_path / "again.png", noise(3))
    write(tmp_path / "broken.png", noise(3)[:100])
    write(tmp_path / "noise.txt", "words alone")
    parts = [text_part("two"), image_part(data_url(noise(20))), image_part("9.png")]
    write_lines(tmp_path / "lines.jsonl", {"parts": parts}, {"oops": 1})
    found = pictures(tmp_path, SIDE, held_out_share=0.2, seed=1)
    assert found.train.shape == (9, SIDE, SIDE, 3) and found.train.dtype == np.uint8
    assert found.held_out.shape == (2, SIDE, SIDE, 3)
    together = np.concatenate([found.train, found.held_out])
    assert len(np.unique(together.reshape(11, -1), axis=0)) == 11
    assert sum(found.skips.counts.values()) == 2
    again = pictures(tmp_path, SIDE, held_out_share=0.2, seed=1)
    assert np.array_equal(again.train, found.train)
    assert np.array_equal(again.held_out, found.held_out)
    others = [pictures(tmp_path, SIDE, held_out_share=0.2, seed=seed) for seed in (2, 3, 4)]
    assert any(not np.array_equal(each.held_out, found.held_out) for each in others)


def test_one_picture_is_too_few(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(RED))
    write(tmp_path / "b.png", png(RED))
    write(tmp_path / "c.png", b"broken")
    with pytest.raises(DataError, match=r"1 different pictures(.|\n)*broken(.|\n)*c\.png"):
        pictures(tmp_path, SIDE)
