"""Pictures are bytes that can save themselves, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from momaserve_client import Png, picture
from momaserve_client.images import media_type
from tests.client.both import PNG


def test_is_bytes(tmp_path: Path) -> None:
    png = Png(PNG + b"rest")
    assert png == PNG + b"rest"
    png.save(tmp_path / "a.png")
    png.save(str(tmp_path / "a.png"))  # once more, over it
    assert (tmp_path / "a.png").read_bytes() == png
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_leaves_nothing_behind_when_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        Png(PNG).save(tmp_path / "a.png")
    with pytest.raises(OSError):
        Png(PNG).save(tmp_path / "none" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"BM12", "image/bmp"),
        (b"RIFF1234WEBPVP8 ", "image/webp"),
        (b"RIFF1234WAVE", None),
        (b"<svg>", None),
        (b"", None),
    ],
)
def test_media_types(data: bytes, kind: str | None) -> None:
    assert media_type(data) == kind
    url = picture(data)["image_url"]["url"]
    assert url.startswith(f"data:{kind or 'image/*'};base64,")
