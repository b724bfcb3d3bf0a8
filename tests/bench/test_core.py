"""`momaserve bench core`: what it prints, not how long it takes."""

from __future__ import annotations

import json

import pytest

from momaserve_server.cli import main


def test_prints_tables_and_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--running", "3", "5", "--steps", "20", "--tokens", "512", "100", "--block-size", "16"]
    assert main(["bench", "core", *words]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert any("median us" in line for line in table)
    report = json.loads(last)
    assert report["bench"] == "core"
    assert report["settings"]["running"] == [3, 5]
    assert {"commit", "torch", "threads"} <= report["machine"].keys()
    assert [(row["load"], row["num_running"]) for row in report["planning"]] == [
        ("decode", 3),
        ("decode", 5),
        ("mixed", 3),
        ("mixed", 5),
    ]
    whole, partial = report["kv_memory"]
    assert whole["ratio"] == 1.0
    assert partial["ratio"] == 112 / 100


@pytest.mark.parametrize("option", ["--running", "--steps", "--tokens", "--block-size"])
def test_counts_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "core", option, "0"]) == 2
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_an_unknown_preset_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "core", "--steps", "1", "--preset", "moma-1b"]) == 2
    assert "moma-1b" in capsys.readouterr().err
