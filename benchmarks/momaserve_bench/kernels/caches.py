"""How large the last-level cache is, as the system tells."""

from __future__ import annotations

from pathlib import Path

_SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_bytes(directory: Path = _SYSFS) -> int | None:
    """Bytes of the largest data cache of the first CPU; None where the system does not tell.

    Args:
        directory: has a folder `index…` for each cache, with files `size` ("2048K") and `type`.
    """
    sizes = [
        _bytes_of(_read(index / "size"))
        for index in sorted(directory.glob("index*"))
        if _read(index / "type") in ("Data", "Unified")
    ]
    return max((size for size in sizes if size is not None), default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _bytes_of(text: str) -> int | None:
    unit = _UNITS.get(text[-1:], 1)
    digits = text[:-1] if unit > 1 else text
    return int(digits) * unit if digits.isascii() and digits.isdigit() else None
