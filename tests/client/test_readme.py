"""Every snippet of the client's README runs, in order, against a live server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import momaserve_client
from momaserve_client import Client
from momaserve_client.exchange import DEFAULT_URL
from momaserve_client.images import media_type
from tests.server.live import live

TEXT = (Path(__file__).parents[2] / "clients" / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with live() as running:
        for number, snippet in enumerate(SNIPPETS, 1):
            code = compile(snippet.replace(DEFAULT_URL, running.url), f"snippet {number}", "exec")
            exec(code, names)
        names["client"].close()
        names["careful"].close()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"apple.png", "growing.png", "whole.png", "partial.png"}
    assert {media_type(data) for data in files.values()} == {"image/png"}
    shown = capsys.readouterr().out
    assert "[4/4]" in shown
    for word in ("too long", "no answer", "None None"):  # what only a failure prints
        assert word not in shown


def test_nothing_is_fenced_that_is_not_run() -> None:
    assert TEXT.count("```") == 2 * len(SNIPPETS)


def test_every_method_is_there() -> None:
    methods = {name for name in vars(Client) if not name.startswith("_")} - {"close"}
    shown = "\n".join(SNIPPETS)
    assert {name for name in methods if f"client.{name}(" not in shown} == set()


def test_all_that_is_exported_exists() -> None:
    assert sorted(momaserve_client.__all__) == momaserve_client.__all__
    for name in momaserve_client.__all__:
        assert hasattr(momaserve_client, name)
