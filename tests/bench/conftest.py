"""A small random checkpoint without tokenizers, and an engine on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from momaserve.engine import Engine
from tests.engine.driver import make_engine
from tests.reference.checkpoints import CASES, random_checkpoint


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts for words and four for pictures of 4 codes; it knows ids alone."""
    directory = tmp_path_factory.mktemp("checkpoints") / "4t4i"
    directory.mkdir()
    random_checkpoint(directory, seed=1, **CASES["4t4i_post"])
    return directory


@pytest.fixture
def small_engine(small_checkpoint: Path) -> Engine:
    return make_engine(small_checkpoint)
