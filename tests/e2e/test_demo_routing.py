"""What routing does to the demo: causal routing keeps its pictures, a plain 0.5 cut breaks them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from momaserve import LLM
from momaserve.config import RoutingPolicy
from momaserve.demo import CHECKPOINT
from momaserve.sampling import Distribution, OutputMode

CODES = Path(__file__).parent / "picture_codes.json"
"""Names and the image token ids of their rendered pictures."""


def share_of_right_tokens(routing: RoutingPolicy) -> float:
    """Greedy pictures of known names: tokens equal to those of the rendered picture."""
    wanted: dict[str, list[int]] = json.loads(CODES.read_text(encoding="utf-8"))
    llm = LLM(CHECKPOINT, dtype="float32", routing=routing)
    params = llm.default_params(mode=OutputMode.IMAGE, seed=0, image=Distribution(temperature=0))
    right = total = 0
    for (_, codes), result in zip(wanted.items(), llm.generate(list(wanted), params), strict=True):
        got = result.choices[0].token_ids[1:-1]
        right += sum(a == b for a, b in zip(got, codes, strict=True))
        total += len(codes)
    return right / total


@pytest.mark.parametrize("routing", [RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED])
def test_servable_routing_keeps_the_pictures(routing: RoutingPolicy) -> None:
    assert share_of_right_tokens(routing) > 0.8


def test_threshold_routing_breaks_them_visibly() -> None:
    causal = share_of_right_tokens(RoutingPolicy.CAUSAL)
    threshold = share_of_right_tokens(RoutingPolicy.THRESHOLD)
    assert threshold < causal - 0.1
