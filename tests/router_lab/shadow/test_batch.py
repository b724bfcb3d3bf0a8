"""When a batch is large enough that expert choice over it means something."""

from __future__ import annotations

from pathlib import Path

import pytest

from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.router_lab.shadow.batch import BatchRule, Gathered, scopes
from tests.reference import moma_float64 as reference
from tests.router_lab.shadow.factory import sample

RULE = BatchRule()


@pytest.mark.parametrize(
    ("text", "image", "after_s"),
    [
        (0, 0, None),
        (255, 0, None),
        (256, 0, 30.0),
        (2047, 0, 30.0),
        (2048, 0, 0.0),
        (256, 256, 30.0),
        (1792, 256, 0.0),
        (1792, 255, 300.0),  # pictures are there, but too few of their tokens
        (120, 1928, 300.0),
        (255, 255, None),
        (8000, 191, 300.0),
        (8000, 192, 0.0),
    ],
)
def test_when_a_batch_is_scored(text: int, image: int, after_s: float | None) -> None:
    assert RULE.ready_after_s(text + image, {"text": text, "image": image}) == after_s


def config_of(folder: Path, case: str) -> ModelConfig:
    reference.random_checkpoint(folder, seed=0, **reference.CASES[case])
    return ModelConfig.load(folder)


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        ("4t4i_post", {"text": (0,), "image": (1,)}),
        ("moe_8x_post", {"all": (0, 1)}),
        ("1t1i_post", {}),
        ("depth_image_only_post", {"text": (0,), "image": (1,), "depth": (1,)}),
        ("depth_dense_pre", {"depth": (0, 1)}),
    ],
)
def test_what_routers_choose_among(
    case: str, kinds: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    found = scopes(config_of(tmp_path, case))
    assert list(found.values()) == [tuple(map(Modality, kind)) for kind in kinds.values()]
    assert len(found) == len(kinds)


def test_tokens_are_counted_by_modality_and_kind(tmp_path: Path) -> None:
    config = config_of(tmp_path, "depth_image_only_post")
    assert config.image is not None
    code = config.image.first_token_id
    gathered = Gathered(config)
    gathered.add(sample([1, 2, code, code + 1, 3]))
    gathered.add(sample([1, code, 2]))
    assert gathered.num_tokens == 8
    assert gathered.by_modality == {Modality.TEXT: 5, Modality.IMAGE: 3}
    assert gathered.by_kind == {"text": 5, "image": 3, "depth": 3}
    assert len(gathered.samples) == 2
