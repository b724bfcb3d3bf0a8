"""Random checkpoints of every configuration, made once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from momaserve.engine import Engine
from tests.engine.driver import make_engine
from tests.engine.work import Alone
from tests.reference.checkpoints import CASES, random_checkpoint

CheckpointFor = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint_for(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFor:
    """Directory of the checkpoint of a case of `tests.reference.checkpoints.CASES`."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case)
            random_checkpoint(made[case], seed=1, **CASES[case])
        return made[case]

    return get


@pytest.fixture
def engine(checkpoint_for: CheckpointFor) -> Engine:
    """A fresh engine on a model with four experts for words and four for pictures."""
    return make_engine(checkpoint_for("4t4i_post"))


@pytest.fixture(scope="session")
def alone(checkpoint_for: CheckpointFor) -> Alone:
    """Answers of requests that run alone, computed once per session."""
    return Alone(checkpoint_for)
