"""Every command of README and the how-to pages, run as a reader would, against a real server."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import LiveServer, start_server, stop_server

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "howto").glob("*.md")))
SHOWN_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 300
NOT_HERE = (
    "make serve",  # makes an environment, as CI did to get here
    "docker run",  # deploy/container/check.sh runs the image
    "--data DATA",  # hours; tests/training runs the same commands on a small folder
    "momaserve chat   ",  # a conversation; tests/server/test_chat_terminal.py has one
)
"""Words of blocks that other tests run."""


@dataclass(frozen=True, slots=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page.name, line, match[1], match[2])


ALL = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in ALL if not any(words in block.text for words in NOT_HERE)]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    live = start_server()
    yield live
    assert stop_server(live) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader works: blocks of a page find the files of those before them."""
    return tmp_path_factory.mktemp("reader")


def environment() -> dict[str, str]:
    folder = Path(sys.executable).parent
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in ALL} <= {"sh", "python"}
    assert len(RUN) > 20


@pytest.mark.parametrize("block", RUN, ids=str)
def test_commands_work(block: Block, server: LiveServer, folder: Path) -> None:
    text = block.text.replace(SHOWN_URL, server.url).replace(".venv/bin/momaserve", "momaserve")
    place = folder / block.page.removesuffix(".md")
    place.mkdir(exist_ok=True)
    if block.language == "python":
        run([sys.executable, "-c", text], place)
        return
    lines = text.splitlines()
    if any(line.startswith("momaserve serve") for line in lines):
        serves(text, place)
    else:
        run(["bash", "-euo", "pipefail", "-c", text], place)


def run(command: list[str], place: Path) -> None:
    done = subprocess.run(
        command, cwd=place, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def serves(text: str, place: Path) -> None:
    """A block that starts a server: it gets ready, and ends well when it is told to."""
    text = re.sub(r"^momaserve serve", "exec momaserve serve --port 0", text, flags=re.M)
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=place,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    seen: list[str] = []
    for line in process.stderr:
        seen.append(line)
        if "ready after" in line:
            break
    else:
        raise AssertionError("".join(seen))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
