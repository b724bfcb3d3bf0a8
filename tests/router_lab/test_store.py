"""Parts are found again while what they depend on agrees, and written whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from momaserve.router_lab.store import Store, plain


def test_a_part_is_found_again_by_what_it_depends_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.load("noise", {"seed": 1}) is None
    saved = store.save("noise", {"seed": 1}, {"loss": np.float32(0.123456789)})
    assert saved == {"loss": 0.123457}
    assert Store(tmp_path).load("noise", {"seed": 1}) == saved
    assert store.load("noise", {"seed": 2}) is None
    assert store.load("shift", {"seed": 1}) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"hash": 1}', "\xff"])
def test_what_is_no_part_is_made_again(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path)
    (store.directory / "noise.json").write_text(content, encoding="latin-1")
    assert store.load("noise", {}) is None


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(TypeError):
        store.save("noise", {}, {"value": object()})
    assert list(store.directory.iterdir()) == []


def test_plain_values_are_json_as_it_should_be() -> None:
    value = {1: (np.int64(3), float("nan"), float("inf"), None, True, "x", 1.23456789)}
    found = plain(value)
    assert found == {"1": [3, None, None, None, True, "x", 1.23457]}
    assert type(found["1"][0]) is int
    assert json.loads(json.dumps(found, allow_nan=False)) == found
