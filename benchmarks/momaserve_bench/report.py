"""How benchmarks report: a table for people, and one JSON line for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from momaserve.environment import machine
from momaserve.errors import ConfigError


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their widest cell, numbers to the right."""
    cells = [[_text(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def print_result(
    bench: str, settings: dict[str, Any], metrics: dict[str, Any], *, save: Path | None = None
) -> None:
    """The last line of standard output; `save` is a file that gets it too."""
    line = json.dumps({"bench": bench, "settings": settings, "machine": machine(), **metrics})
    if save is not None:
        save.write_text(line + "\n", encoding="utf-8")
    print(line)


def check_writable(flag: str, path: Path | None) -> None:
    """Better to hear now than after a long run; None is no file.

    Raises:
        ConfigError: the file that `flag` names cannot be written.
    """
    if path is None:
        return
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error}") from None
    if is_new:
        path.unlink()


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _text(cell: object) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
