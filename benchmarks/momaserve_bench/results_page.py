"""The results part of a Markdown page: what stands between two marks, and nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from momaserve.errors import DataError
from momaserve.training.run import write_atomically

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsPage:
    """A page with both marks; what is around them stays as it is."""

    path: Path
    head: str
    tail: str

    @classmethod
    def open(cls, path: Path) -> ResultsPage:
        """Raises DataError: the page cannot be read, or lacks the marks."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        head, begin, rest = text.partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not begin or not end:
            raise DataError(f"{path} must hold {BEGIN} and, after it, {END}")
        return cls(path=path, head=head, tail=tail)

    def write(self, results: str) -> None:
        """Replace the results part, the page at once.

        Raises:
            DataError: the page cannot be written.
        """
        text = f"{self.head}{BEGIN}\n{results}{END}{self.tail}"
        try:
            write_atomically(self.path, text)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error}") from error


def table_line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
