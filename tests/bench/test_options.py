"""Arguments of the benchmarks: `--help` is quick, and shows every default."""

from __future__ import annotations

import subprocess
import sys

import pytest

from momaserve_server.cli import main
from tests.server.test_cli import HEAVY

COMMANDS = ("latency", "throughput", "serve", "learning", "architectures", "growth", "kernels")


@pytest.mark.parametrize("bench", [[], *([name] for name in COMMANDS)])
def test_help_is_light(bench: list[str]) -> None:
    heavy = (*HEAVY, "httpx", "matplotlib")
    code = (
        "import sys\nfrom momaserve_server.cli import main\n"
        f"try:\n    main({['bench', *bench, '--help']!r})\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {heavy!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("bench", COMMANDS)
def test_help_shows_no_key(
    bench: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOMASERVE_API_KEY", "secret")
    with pytest.raises(SystemExit) as end:
        main(["bench", bench, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "secret" not in shown
    assert "(default: " in shown


@pytest.mark.parametrize(
    "words",
    [
        ["latency", "--modality", "sound"],
        ["serve", "--partial-images", "4"],
        ["throughput", "--probe-fraction", "0.5"],  # nobody to wait for
        ["throughput", "--num-prompts", "x"],
    ],
)
def test_words_that_are_no_arguments(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", *words])
    assert end.value.code == 2
    assert words[1] in capsys.readouterr().err
