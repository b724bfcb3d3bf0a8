"""Samples laid end to end: targets, policies of tokens, and attention without a mask."""

from __future__ import annotations

import pytest
import torch

from momaserve.config import RoutingPolicy
from momaserve.layers.batch import POLICY_CODES
from momaserve.router_lab.shadow.rows import SampleAttention, rows_of, served_plan
from momaserve.training.packing import PackedAttention
from tests.router_lab.shadow.factory import CALIBRATED, CAUSAL, WHOLE, sample

CPU = torch.device("cpu")


def test_answers_are_learnt_and_prompts_are_not() -> None:
    rows = rows_of([sample([11, 12, 13, 14, 15], 3), sample([21, 22, 23], 1)])
    assert rows.token_ids.tolist() == [[11, 12, 13, 14, 15, 21, 22, 23]]
    assert rows.targets.tolist() == [[-100, -100, 14, 15, -100, 22, 23, -100]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert rows.documents is not None
    assert rows.documents.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert not rows.is_padding.any()


def test_an_empty_prompt_leaves_the_first_token_out() -> None:
    assert rows_of([sample([11, 12, 13], 0)]).targets.tolist() == [[12, 13, -100]]


def test_each_token_has_the_policy_that_served_it() -> None:
    samples = [
        sample([1, 2, 3], 2, CAUSAL, WHOLE),
        sample([1, 2, 3, 4], 1, CALIBRATED, CAUSAL),
        sample([1, 2, 3], 2, CALIBRATED, WHOLE),
    ]
    plan = served_plan(samples, CPU)
    by_code = {code: policy for policy, code in POLICY_CODES.items()}
    assert [by_code[int(code)] for code in plan.policy] == [
        *(WHOLE, WHOLE, CAUSAL),
        *(CAUSAL, CALIBRATED, CALIBRATED, CALIBRATED),
        *(WHOLE, WHOLE, CALIBRATED),
    ]
    assert plan.segments.tolist() == [0, 0, -1, -1, -1, -1, -1, 2, 2, -1]
    assert plan.num_segments == 3
    assert plan.policies == {WHOLE, CAUSAL, CALIBRATED}
    assert served_plan([sample([1, 2, 3])], CPU).policies == {RoutingPolicy.CAUSAL}


@pytest.mark.parametrize("skips", [False, True])
def test_attention_is_that_of_training(skips: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    samples = [sample(range(length)) for length in (5, 1, 9)]
    q, k, v = (torch.randn(15, heads, 8, generator=generator) for heads in (4, 2, 2))
    taken = torch.rand(15, generator=generator) < 0.5 if skips else None
    if taken is not None:
        taken[5] = False  # of one sample, nothing
    found = SampleAttention(samples)(0, q, k, v, taken)
    wanted = PackedAttention(rows_of(samples))(0, q, k, v, taken)
    told = slice(None) if taken is None else taken
    assert torch.allclose(found[told], wanted[told], atol=1e-6)
    assert bool(found.isfinite().all())
