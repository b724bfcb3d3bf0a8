"""A run killed with SIGKILL, at any moment, ends with the very bits of an undisturbed one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from momaserve.training.run import read_log
from tests.training.killable import KINDS, NUM_STEPS, Victim, state_of

KILLED = -9


@pytest.fixture(autouse=True)
def one_thread() -> None:
    assert torch.get_num_threads() == 1, "sums over threads have no fixed order"


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def whole(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the undisturbed run of a kind wrote."""
    out = tmp_path_factory.mktemp("whole")
    KINDS[kind](out)
    yield out


def assert_ends_alike(kind: str, out: Path, whole: Path) -> None:
    """Resumes `out` to its end."""
    KINDS[kind](out)
    for path in (out / "model.safetensors", out / "config.json", state_of(kind, out)):
        assert path.read_bytes() == (whole / path.relative_to(out)).read_bytes(), path.name
    directory = state_of(kind, whole).parent
    log, wanted = read_log(state_of(kind, out).parent), read_log(directory)
    timed = {"elapsed_s", "tokens_per_s"}
    assert [{k: v for k, v in r.items() if k not in timed} for r in log] == [
        {k: v for k, v in r.items() if k not in timed} for r in wanted
    ]


def test_killed_at_any_moment(kind: str, whole: Path, tmp_path: Path) -> None:
    """Three times in one run: after so many lines of the log as the seed says, and as many steps
    more as the run gets done meanwhile."""
    moments = random.Random(kind).sample(range(1, NUM_STEPS // 4), 3)
    for count in moments:
        victim = Victim(kind, tmp_path)
        victim.wait_for("logged", count)
        assert victim.kill() == KILLED
    assert_ends_alike(kind, tmp_path, whole)


@pytest.mark.parametrize("where", ["half", "before", "after"])
def test_killed_while_saving(kind: str, whole: Path, tmp_path: Path, where: str) -> None:
    victim = Victim(kind, tmp_path, stop_in_save=where)
    victim.wait_for("saving")
    assert victim.kill() == KILLED
    step = int(load_file(state_of(kind, tmp_path))["step"])
    assert step == (6 if where == "after" else 3)
    assert_ends_alike(kind, tmp_path, whole)
