"""The results part of a page is replaced, and nothing else of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from momaserve.errors import DataError
from momaserve_bench.results_page import BEGIN, END, ResultsPage, table_line


def test_only_what_is_between_the_marks_changes(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"# Title é\n\n{BEGIN}\nold\n{END}\n\nafter\n", encoding="utf-8")
    for results in ("new\n", "newer\nstill\n", "new\n"):
        ResultsPage.open(path).write(results)
    assert path.read_text(encoding="utf-8") == f"# Title é\n\n{BEGIN}\nnew\n{END}\n\nafter\n"
    assert [file.name for file in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END} {BEGIN}", "no marks"])
def test_a_page_without_marks_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"page\.md must hold .*begin.* and, after it, .*end"):
        ResultsPage.open(path)


def test_a_page_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"page\.md cannot be read"):
        ResultsPage.open(tmp_path / "page.md")
    (tmp_path / "page.md").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"page\.md cannot be read"):
        ResultsPage.open(tmp_path / "page.md")


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    page = ResultsPage(path=tmp_path / "gone" / "page.md", head="", tail="")
    with pytest.raises(DataError, match=r"page\.md cannot be written"):
        page.write("new\n")


def test_a_line_of_a_table() -> None:
    assert table_line(["a", 1, 0.5]) == "| a | 1 | 0.5 |"
