"""Engines on the Triton backend answer what engines on plain torch do."""

from __future__ import annotations

from pathlib import Path

import pytest

from momaserve.config import RoutingPolicy
from momaserve.sampling import OutputMode
from tests.engine.driver import BEGIN_IMAGE, BOS, WORDS, make_engine
from tests.engine.work import Ask, ask, assert_all_equal, run
from tests.kernels.triton.device import DEVICE
from tests.kernels.triton.fat import fatten
from tests.reference.checkpoints import CASES, random_checkpoint

ASKS: list[Ask] = [
    ask(WORDS, mode=OutputMode.TEXT, max_tokens=3, include_routing=True),
    ask(
        [BOS, 34, BEGIN_IMAGE],
        mode=OutputMode.IMAGE,
        guidance_scale=2.5,
        prompt_routing=RoutingPolicy.EXPERT_CHOICE,
    ),
    ask([BOS, 40], mode=OutputMode.TEXT, max_tokens=2, routing=RoutingPolicy.CALIBRATED),
]


@pytest.mark.parametrize("plan_ahead", [True, False])
@pytest.mark.parametrize("case", ["uneven_pre", "depth_4t4i_post"])
def test_words_and_pictures(
    tmp_path: Path, case: str, plan_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        fatten(monkeypatch)
    shape = CASES[case] | {"head_dim": 16, "layers": 3 if "depth" in CASES[case] else 2}
    random_checkpoint(tmp_path, seed=1, **shape)
    wanted = run(make_engine(tmp_path, backend="reference"), ASKS)
    engine = make_engine(tmp_path, backend="triton", plan_ahead=plan_ahead)
    assert engine.backend_name == "triton"
    assert_all_equal(run(engine, ASKS), wanted)
