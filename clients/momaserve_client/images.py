"""Pictures as the bytes of their files. Knows file signatures, decodes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SIGNATURES: Mapping[bytes, str] = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}


class Png(bytes):
    """A PNG file: its bytes, which can also save themselves."""

    def __repr__(self) -> str:
        return f"<Png of {len(self)} bytes>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; one that is there is replaced.

        Raises:
            OSError: it cannot be written.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            partial.write_bytes(self)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def media_type(data: bytes) -> str | None:
    """The type of a picture file by its first bytes; None for what servers do not take."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((name for start, name in SIGNATURES.items() if data.startswith(start)), None)
