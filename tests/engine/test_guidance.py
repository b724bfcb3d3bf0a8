"""Guided pictures against two forwards of the float64 reference, and with mates and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from momaserve.config import RoutingPolicy
from momaserve.sampling import OutputMode
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import BEGIN_IMAGE, BOS, FIRST_CODE, NUM_CODES, Recorder, make_engine
from tests.engine.work import (
    PICTURE,
    SHAPES,
    WAYS,
    Alone,
    Answer,
    Ask,
    ask,
    assert_all_equal,
    assert_equal,
    make_asks,
    run,
    run_one,
)
from tests.reference.moma_float64 import Policy, forward, load_checkpoint, log_probs

CODES = slice(FIRST_CODE, FIRST_CODE + 16)
WORDS = (BOS, 30, 31, 32, 33, 34)
SCALE = 3.0
MARGIN = 1e-3
"""By which float32 may take another token than the best of float64."""


def draws(tokens: Sequence[int], stop: int) -> Iterator[tuple[int, int]]:
    """(position, position of its begin_image) of each code from `stop` on."""
    begin = None
    for position, token in enumerate(tokens):
        if token == BEGIN_IMAGE:
            begin = position
        elif begin is not None and position <= begin + NUM_CODES and position >= stop:
            yield position, begin


def assert_guided(
    checkpoint_for: CheckpointFor,
    case: str,
    one: Ask,
    answer: Answer,
    policies: tuple[Policy, Policy] = ("causal", "causal"),
) -> int:
    """Checks every code of a greedy answer.

    Args:
        policies: of the request, and of its companions.

    Returns:
        How many codes guidance made others than they were without it.
    """
    config, weights = load_checkpoint(checkpoint_for(case))
    tokens = [*one.prompt, *answer.token_ids]
    num_prompt = len(one.prompt)
    conditional = forward(config, weights, tokens, policies[0], num_prompt)
    values = log_probs(conditional)
    scale = one.params.guidance_scale
    num_checked = num_changed = 0
    companion: dict[int, Any] = {}
    for position, begin in draws(tokens, num_prompt):
        if begin not in companion:  # its own positions, and nothing of the picture before
            alike = [BOS, BEGIN_IMAGE, *tokens[begin + 1 : begin + NUM_CODES]]
            companion[begin] = forward(config, weights, alike, policies[1])
        c = conditional[position - 1]
        u = companion[begin][position - begin]
        guided = (u + scale * (c - u))[CODES]
        code = tokens[position] - FIRST_CODE
        assert guided[code] >= guided.max() - MARGIN * (1 + scale)
        entry = answer.logprobs[position - num_prompt]
        assert entry.logprob == pytest.approx(values[position - 1, tokens[position]], abs=1e-3)
        num_checked += 1
        num_changed += int(np.argmax(c[CODES])) != code
    assert num_checked >= 1
    return num_changed


PROMPTS: dict[str, Ask] = {
    "words": ask(WORDS, mode="image", guidance_scale=SCALE),
    "bos": ask((BOS,), mode="image", guidance_scale=SCALE),
    "after a picture": ask((*WORDS, *PICTURE, 40), mode="image", guidance_scale=SCALE),
    "begun": ask((*WORDS, BEGIN_IMAGE), mode="image", guidance_scale=SCALE),
    "half": ask((*WORDS, *PICTURE[:3]), mode="image", guidance_scale=SCALE),
    "half, then text": ask((*WORDS, *PICTURE[:3]), max_tokens=8, guidance_scale=SCALE),
    "second half": ask((*PICTURE, 40, *PICTURE[:2]), mode="interleaved", guidance_scale=0.0),
    "several": ask(
        (BOS, 35, 36),
        mode="interleaved",
        max_tokens=21,
        guidance_scale=SCALE,
        logit_bias={BEGIN_IMAGE: 12.0},
    ),
}


@pytest.mark.parametrize("case", [s for s in SHAPES if s != "gqa_pre"])
def test_guided_codes_are_those_of_two_forwards(checkpoint_for: CheckpointFor, case: str) -> None:
    asks = list(PROMPTS.values())
    answers = [answer for (answer,) in run(make_engine(checkpoint_for(case)), asks)]
    assert answers[-1].token_ids.count(BEGIN_IMAGE) >= 2  # the companion starts anew for each
    num_changed = sum(
        assert_guided(checkpoint_for, case, one, answer)
        for one, answer in zip(asks, answers, strict=True)
    )
    assert num_changed > 3  # else guidance did nothing here


@pytest.mark.parametrize("case", ["4t4i_post", "moe_8x_pre", "depth_4t4i_post"])
@pytest.mark.parametrize(
    ("fields", "policies"),
    [
        ({"prompt_routing": RoutingPolicy.EXPERT_CHOICE}, ("expert_choice", "causal")),
        ({"routing": RoutingPolicy.CALIBRATED}, ("calibrated", "calibrated")),
    ],
    ids=["expert_choice", "calibrated"],
)
def test_companions_are_routed_as_generated_tokens_are(
    checkpoint_for: CheckpointFor,
    alone: Alone,
    case: str,
    fields: dict[str, Any],
    policies: tuple[Policy, Policy],
) -> None:
    """They are out of the scope of expert choice over the prompt."""
    asks = [PROMPTS[name].but(**fields) for name in ("words", "half", "several")]
    answers = run(make_engine(checkpoint_for(case)), asks)
    for one, (answer,) in zip(asks, answers, strict=True):
        assert_guided(checkpoint_for, case, one, answer, policies)
    assert_all_equal(answers, alone(case, asks))


@pytest.mark.parametrize("mode", OutputMode)
def test_a_scale_of_one_is_no_guidance(checkpoint_for: CheckpointFor, mode: OutputMode) -> None:
    """It has no companion: no token more is computed."""
    counted = []
    answers = []
    for fields in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 1.5}):
        engine = make_engine(checkpoint_for("4t4i_post"))
        engine.listener = listener = Recorder()
        one = ask(WORDS, mode=mode, max_tokens=7, logit_bias={BEGIN_IMAGE: 12.0}, **fields)
        answers.append(run_one(engine, one))
        counted.append([step.num_tokens for step in listener.steps])
    assert_equal(answers[1], answers[0])
    assert counted[1] == counted[0]
    num_more = [a - b for a, b in zip(counted[2], counted[0], strict=True)]
    pictures = {
        OutputMode.TEXT: [0] * 7,
        OutputMode.IMAGE: [2, 1, 1, 1],
        OutputMode.INTERLEAVED: [0, 2, 1, 1, 1, 0],
    }
    assert num_more == pictures[mode]


def test_a_scale_of_zero_forgets_the_prompt(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    wanted = run_one(engine, ask((BOS,), mode="image"))
    answer = run_one(engine, ask(WORDS, mode="image", guidance_scale=0.0))
    assert answer.token_ids == wanted.token_ids
    assert answer.token_ids != run_one(engine, ask(WORDS, mode="image")).token_ids
    (drawn,) = run(engine, [ask(WORDS, mode="image", guidance_scale=0.0, image=WAYS[1], n=3)])
    (plain,) = run(engine, [ask((BOS,), mode="image", image=WAYS[1], n=3)])
    assert [a.token_ids[0] for a in drawn] == [a.token_ids[0] for a in plain]


def test_text_knows_no_guidance(checkpoint_for: CheckpointFor, alone: Alone) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_requests=1, max_num_step_tokens=1)
    one = ask(WORDS, max_tokens=5)
    assert_all_equal([[run_one(engine, one.but(guidance_scale=4.0))]], alone("4t4i_post", [one]))


@pytest.mark.parametrize("case", SHAPES)
def test_guided_and_unguided_mates(checkpoint_for: CheckpointFor, alone: Alone, case: str) -> None:
    asks = [
        one.but(guidance_scale=(2.0, 1.0, 0.5, 7.0)[(index // 2) % 4])
        for index, one in enumerate(make_asks(checkpoint_for(case), 9, first=20))
    ]
    for step_tokens, max_num_requests in ((2, 32), (7, 3)):
        engine = make_engine(
            checkpoint_for(case),
            max_num_step_tokens=step_tokens,
            max_num_requests=max_num_requests,
        )
        assert_all_equal(run(engine, asks, per_step=4), alone(case, asks))
