"""n samples of one prompt are n requests with following seeds, and compute the prompt once."""

from __future__ import annotations

from typing import Any

import pytest

from momaserve.config import RoutingPolicy
from momaserve.sampling import Distribution
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import BOS, Recorder, make_engine
from tests.engine.work import (
    BLOCK_SIZE,
    SHAPES,
    Alone,
    Answer,
    Ask,
    ask,
    assert_all_equal,
    assert_equal,
    cache_of,
    in_turn,
    make_asks,
    name_of,
    run,
)

HOT = Distribution(temperature=4.0)
EXPERT_CHOICE = RoutingPolicy.EXPERT_CHOICE
KINDS: list[dict[str, Any]] = [
    {},
    {"mode": "image"},
    {"mode": "interleaved", "logit_bias": {21: 6.0}},
    {"mode": "image", "guidance_scale": 2.5},
    {"mode": "interleaved", "logit_bias": {21: 6.0}, "guidance_scale": 2.5, "max_tokens": 14},
    {"prompt_logprobs": 1},
    {"mode": "image", "guidance_scale": 2.5, "prompt_logprobs": 0},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "min_tokens": 3},
]


def sampled(num_prompt: int = 10, *, n: int = 3, **fields: Any) -> Ask:
    """Drawn at random, else all samples were the same."""
    prompt = (BOS, *range(30, 29 + num_prompt))
    drawn: dict[str, Any] = {"text": HOT, "image": HOT, "max_tokens": 9, "seed": 50}
    return ask(prompt, n=n, **{**drawn, **fields})


# --- equality ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "prompt_routing"),
    [
        ("dense_post", None),
        ("4t4i_post", None),
        ("moe_8x_pre", EXPERT_CHOICE),
        ("4t4i_post", EXPERT_CHOICE),
        ("depth_4t4i_post", EXPERT_CHOICE),
    ],
)
def test_samples_equal_single_requests(
    checkpoint_for: CheckpointFor, alone: Alone, case: str, prompt_routing: RoutingPolicy | None
) -> None:
    """`alone` answers them one by one, with seeds 50, 51 and 52."""
    engine = make_engine(checkpoint_for(case))
    asks = [
        sampled(7 + number, prompt_routing=prompt_routing, **kind)
        for number, kind in enumerate(KINDS)
    ]
    wanted = alone(case, asks)
    for answers in wanted:
        assert len({tuple(answer.token_ids) for answer in answers}) > 1
        scored = [answer.prompt_logprobs for answer in answers]
        assert scored == scored[:1] * 3
    assert_all_equal(run(engine, asks[3:4]), wanted[3:4])
    assert_all_equal(run(engine, asks), wanted)


@pytest.mark.parametrize("case", SHAPES)
def test_samples_among_mates(checkpoint_for: CheckpointFor, alone: Alone, case: str) -> None:
    asks = in_turn(make_asks(checkpoint_for(case), 6, first=40), n=[3, 1, 2])
    engine = make_engine(checkpoint_for(case), max_num_requests=9, max_num_step_tokens=16)
    assert_all_equal(run(engine, asks, per_step=2), alone(case, asks))


@pytest.mark.parametrize("max_num_requests", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS[3:7], ids=name_of)
def test_more_samples_than_may_run(
    checkpoint_for: CheckpointFor, alone: Alone, max_num_requests: int, kind: dict[str, Any]
) -> None:
    one = sampled(n=5, **kind)
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_requests=max_num_requests)
    assert_all_equal(run(engine, [one]), alone("4t4i_post", [one]))


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_more_samples_than_blocks(
    checkpoint_for: CheckpointFor, alone: Alone, prefix_caching: bool
) -> None:
    one = sampled(n=5, max_tokens=14, prompt_routing=EXPERT_CHOICE)
    checkpoint = checkpoint_for("4t4i_post")
    engine = make_engine(checkpoint, **cache_of(checkpoint, 8), prefix_caching=prefix_caching)
    engine.listener = listener = Recorder()
    assert_all_equal(run(engine, [one]), alone("4t4i_post", [one]))
    assert sum(step.num_preemptions for step in listener.steps) > 0


# --- the prompt is computed once -----------------------------------------------------------


@pytest.mark.parametrize("prompt_routing", [None, EXPERT_CHOICE])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_prompt", [7, 8, 9])
def test_the_prompt_is_computed_once(
    checkpoint_for: CheckpointFor,
    num_prompt: int,
    prefix_caching: bool,
    prompt_routing: RoutingPolicy | None,
) -> None:
    """Its blocks are shared, and the one that is not full is copied as late as possible."""
    checkpoint = checkpoint_for("4t4i_post")
    num_blocks = 32
    engine = make_engine(
        checkpoint, **cache_of(checkpoint, num_blocks), prefix_caching=prefix_caching
    )
    engine.listener = listener = Recorder()
    one = sampled(num_prompt, n=5, max_tokens=4, prompt_routing=prompt_routing, prompt_logprobs=0)
    usage: list[int] = []
    run(
        engine,
        [one],
        between=lambda _: usage.append(round(engine.scheduler.kv_cache.usage * num_blocks)),
    )
    assert [step.num_tokens for step in listener.steps] == [num_prompt, 5, 5, 5]
    assert sum(step.prompt_tokens for step in listener.steps) == num_prompt
    own = [5 * -(-(num_prompt + k) // BLOCK_SIZE) for k in (1, 2)]
    shared = 4 * (num_prompt // BLOCK_SIZE)
    assert usage[:3] == [-(-num_prompt // BLOCK_SIZE), own[0] - shared, own[1] - shared]


def test_the_prompt_is_computed_once_in_chunks_and_with_guidance(
    checkpoint_for: CheckpointFor, alone: Alone
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_step_tokens=6)
    engine.listener = listener = Recorder()
    one = sampled(10, n=3)
    assert_all_equal(run(engine, [one]), alone("4t4i_post", [one]))
    assert [step.num_tokens for step in listener.steps][:3] == [6, 4, 3]
    engine = make_engine(checkpoint_for("4t4i_post"))
    engine.listener = listener = Recorder()
    one = sampled(10, n=3, mode="image", guidance_scale=2.0)
    assert_all_equal(run(engine, [one]), alone("4t4i_post", [one]))
    # begin_image follows the prompt; each sample has a companion of two tokens
    assert [step.num_tokens for step in listener.steps] == [10 + 1 + 3 * 2, 6, 6, 6]


# --- samples that end early ----------------------------------------------------------------


@pytest.mark.parametrize("plan_ahead", [False, True])
@pytest.mark.parametrize("num_steps", range(5))
@pytest.mark.parametrize("kind", [{}, KINDS[6]], ids=name_of)
def test_the_first_sample_is_aborted(
    checkpoint_for: CheckpointFor,
    alone: Alone,
    plan_ahead: bool,
    num_steps: int,
    kind: dict[str, Any],
) -> None:
    """Before, while and after the prompt is computed, which it does for the others."""
    one = sampled(10, n=3, prompt_routing=None, **{"prompt_logprobs": 0, **kind})
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_step_tokens=6, plan_ahead=plan_ahead)
    mate = ask((BOS, 40), max_tokens=3)
    wanted = alone("4t4i_post", [mate, one])

    def abort(step: int) -> None:
        if step == num_steps + 1:
            engine.abort("r1-0")

    answers = run(engine, [mate, one], per_step=1, between=abort)
    assert_equal(answers[0][0], wanted[0][0])
    for got, expected in zip(answers[1][1:], wanted[1][1:], strict=True):
        assert_equal(got, expected)
    assert_begins(answers[1][0], wanted[1][0])


def assert_begins(got: Answer, whole: Answer) -> None:
    assert got.token_ids == whole.token_ids[: len(got.token_ids)]


def test_scores_of_the_prompt_outlive_the_sample_that_computed_them(
    checkpoint_for: CheckpointFor, alone: Alone
) -> None:
    """The first sample is aborted while the step that ends the prompt is in flight."""
    engine = make_engine(checkpoint_for("4t4i_post"), plan_ahead=True)
    asks = [ask((BOS, 40), max_tokens=8), sampled(8, n=2, prompt_logprobs=0)]
    wanted = alone("4t4i_post", asks)

    def abort(step: int) -> None:
        if step == 2:
            assert engine.abort("r1-0")

    answers = run(engine, asks, per_step=1, between=abort)
    assert_equal(answers[1][1], wanted[1][1])
