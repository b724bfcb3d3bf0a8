"""generation_config.json: a checkpoint's default sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from momaserve.errors import CheckpointError
from momaserve.models.generation import GenerationDefaults
from momaserve.sampling import Distribution


def load(directory: Path, data: object) -> GenerationDefaults:
    (directory / "generation_config.json").write_text(json.dumps(data), encoding="utf-8")
    return GenerationDefaults.load(directory)


def test_defaults_by_modality(tmp_path: Path) -> None:
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults()
    defaults = load(tmp_path, {"image": {"temperature": 0.5, "top_k": 9}})
    assert defaults.text == Distribution()
    assert defaults.image == Distribution(temperature=0.5, top_k=9)
    assert defaults.guidance_scale == 1.0
    defaults = load(tmp_path, {"image": {"top_p": 0.5, "guidance_scale": 3}})
    assert defaults == GenerationDefaults(image=Distribution(top_p=0.5), guidance_scale=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"audio": {}}, "unknown keys"),
        ({"text": 3}, "must be an object"),
        ({"text": {"heat": 1}}, "keys out of"),
        ({"text": {"temperature": "hot"}}, "must hold numbers"),
        ({"text": {"temperature": -1}}, "temperature must be between 0 and 100, got -1"),
        ({"text": {"top_k": 2.7}}, "top_k must be an integer of at least 0, got 2.7"),
        ({"text": {"guidance_scale": 2}}, "keys out of"),
        ({"image": {"guidance_scale": None}}, "must hold numbers"),
        ({"image": {"guidance_scale": 21}}, "guidance_scale must be between 0 and 20, got 21"),
    ],
)
def test_wrong_defaults_are_named(tmp_path: Path, data: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, data)
