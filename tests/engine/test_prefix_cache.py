"""What is found in the prefix cache is what would have been computed, and nobody else's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from momaserve.config import RoutingPolicy
from momaserve.engine import Engine
from momaserve.sampling import OutputMode
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import BEGIN_IMAGE, BOS, Recorder, make_engine
from tests.engine.work import (
    BLOCK_SIZE,
    PICTURE,
    SHAPES,
    WAYS,
    Alone,
    Answer,
    Ask,
    ask,
    assert_all_equal,
    assert_equal,
    cache_of,
    in_turn,
    make_asks,
    run,
    run_one,
)

CAUSAL, CALIBRATED = RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED
EXPERT_CHOICE = RoutingPolicy.EXPERT_CHOICE
LONG = (BOS, 30, 31, *PICTURE, 32, 33, 34, 35, 36, 37)
"""Fifteen tokens with a picture in them, from position 3 to 8."""


def blocks_of(num_tokens: int) -> int:
    """Tokens in whole blocks."""
    return num_tokens // BLOCK_SIZE * BLOCK_SIZE


def most_hits(one: Ask) -> int:
    """Prompt tokens that a cache which has seen everything spares; the last token is computed."""
    is_open = BEGIN_IMAGE in one.prompt[-4:] and one.prompt[-1] != PICTURE[-1]
    num_forced = int(one.params.mode is OutputMode.IMAGE and not is_open)
    return min(blocks_of(len(one.prompt) + num_forced - 1), len(one.prompt))


def same(engine: Engine, alone: Alone, one: Ask, case: str = "4t4i_post") -> Answer:
    """The answer, once it is found equal to that of a fresh engine without salt."""
    answer = run_one(engine, one)
    ((wanted,),) = alone(case, [one.but(cache_salt=None)])
    assert_equal(answer, wanted)
    return answer


# --- cached = computed ---------------------------------------------------------------------


@pytest.mark.parametrize("case", SHAPES)
def test_the_second_time_equals_the_first(
    checkpoint_for: CheckpointFor, alone: Alone, case: str
) -> None:
    asks = make_asks(checkpoint_for(case), 14)
    engine = make_engine(checkpoint_for(case))
    assert_all_equal(run(engine, asks), alone(case, asks))
    for one in asks:
        answer = same(engine, alone, one, case)
        assert answer.num_cached_tokens == most_hits(one)
    assert sum(most_hits(one) > 0 for one in asks) > 10
    assert_all_equal(run(engine, asks), alone(case, asks))


@pytest.mark.parametrize("case", ["4t4i_post", "depth_4t4i_post"])
def test_prompts_that_share_a_prefix(
    checkpoint_for: CheckpointFor, alone: Alone, case: str
) -> None:
    """Of every length: before, at and after the borders of blocks, and inside a picture."""
    engine = make_engine(checkpoint_for(case))
    whole = ask(LONG, max_tokens=1)
    for num_shared in range(1, len(LONG) + 1):
        salt = f"{num_shared}"
        run(engine, [whole.but(cache_salt=salt)])
        shared = LONG[:num_shared]
        tail: tuple[int, ...] = (41, 42)
        if 4 <= num_shared <= 8:  # inside the picture, which goes on with other codes
            tail = (*(23 - code for code in PICTURE[num_shared - 3 : 5]), PICTURE[5], 40)
        other = ask((*shared, *tail), max_tokens=3, cache_salt=salt)
        agreeing = num_shared if num_shared != 8 else 9  # end_image is the same
        answer = same(engine, alone, other, case)
        assert answer.num_cached_tokens == blocks_of(min(agreeing, len(other.prompt) - 1))
        if num_shared != 8:  # no prompt ends before end_image
            begins = ask(shared, max_tokens=5, mode=mode_of(shared), cache_salt=salt)
            answer = same(engine, alone, begins, case)
            assert answer.num_cached_tokens == blocks_of(num_shared - 1)


def mode_of(prompt: Sequence[int]) -> str:
    return "interleaved" if prompt[-1] in PICTURE else "text"


@pytest.mark.parametrize("num_tokens", range(3, 12))
def test_an_answer_becomes_a_prompt(
    checkpoint_for: CheckpointFor, alone: Alone, num_tokens: int
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    prompt: tuple[int, ...] = (BOS, 30, 31)
    known = 0
    for turn in range(3):
        answer = same(engine, alone, ask(prompt, max_tokens=num_tokens))
        assert answer.num_cached_tokens == blocks_of(known)
        known = len(prompt) + num_tokens - 1  # nobody computes the last token of an answer
        prompt = (*prompt, *answer.token_ids, 40 + turn, 50)


def test_a_picture_of_an_answer_becomes_part_of_a_prompt(
    checkpoint_for: CheckpointFor, alone: Alone
) -> None:
    engine = make_engine(checkpoint_for("depth_4t4i_post"))
    for guidance_scale in (1.0, 2.0):
        prompt = (BOS, 30 + int(guidance_scale), 32, 33)
        drawn = ask(prompt, mode="image", guidance_scale=guidance_scale, image=WAYS[1])
        picture = same(engine, alone, drawn, "depth_4t4i_post").token_ids
        asked = ask((*prompt, *picture, 40, 41), max_tokens=8)
        answer = same(engine, alone, asked, "depth_4t4i_post")
        # 4 + 6 tokens, of which the last code and end_image were never computed
        assert answer.num_cached_tokens == 8


def test_a_prompt_is_shared_while_it_is_computed(
    checkpoint_for: CheckpointFor, alone: Alone
) -> None:
    """Those that arrive together compute a common beginning once, also in chunks."""
    asks = [ask((*LONG, 40 + i), max_tokens=5, seed=i, text=WAYS[1]) for i in range(4)]
    for step_tokens in (8, 512):
        engine = make_engine(checkpoint_for("4t4i_post"), max_num_step_tokens=step_tokens)
        engine.listener = listener = Recorder()
        assert_all_equal(run(engine, asks), alone("4t4i_post", asks))
        computed = sum(step.num_tokens for step in listener.steps)
        assert computed == 12 + 4 * (16 - 12) + 4 * 4
        assert sum(step.prefix_cache_hits for step in listener.steps) <= 36


def test_what_is_evicted_is_computed_again(checkpoint_for: CheckpointFor, alone: Alone) -> None:
    """More prompts than the cache can remember, in turn and again."""
    checkpoint = checkpoint_for("4t4i_post")
    engine = make_engine(checkpoint, **cache_of(checkpoint, 16))
    asks = [ask((BOS, 30 + i, *LONG[2:]), max_tokens=6) for i in range(4)]
    asks += [ask((*one.prompt, 50, 51, 52), max_tokens=4) for one in asks[:2]]
    hits = 0
    for index in (0, 1, 2, 3, 0, 4, 1, 5, 4, 5, 3, 0, 0):
        hits += same(engine, alone, asks[index]).num_cached_tokens
        assert engine.scheduler.kv_cache.num_cached_blocks <= 16
    assert hits > 0


def test_a_prompt_that_is_scored_is_computed(checkpoint_for: CheckpointFor, alone: Alone) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    for prompt_logprobs in (None, 0, None):
        one = ask(LONG, max_tokens=3, prompt_logprobs=prompt_logprobs)
        answer = same(engine, alone, one)
        assert (answer.prompt_logprobs is None) == (prompt_logprobs is None)
        if prompt_logprobs is not None:
            assert len(answer.prompt_logprobs or ()) == len(LONG) - 1
            assert answer.num_cached_tokens == 0
    assert answer.num_cached_tokens == 12


def test_without_a_prefix_cache_nothing_is_found(
    checkpoint_for: CheckpointFor, alone: Alone
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), prefix_caching=False)
    for _ in range(2):
        assert same(engine, alone, ask(LONG, max_tokens=3)).num_cached_tokens == 0
    assert engine.scheduler.kv_cache.num_cached_blocks == 0


# --- who shares with whom ------------------------------------------------------------------


def test_salts_isolate(checkpoint_for: CheckpointFor, alone: Alone) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    one = ask(LONG, max_tokens=3)
    for salt in (None, "a", "b", "salt:", "None"):
        assert same(engine, alone, one.but(cache_salt=salt)).num_cached_tokens == 0
        assert same(engine, alone, one.but(cache_salt=salt)).num_cached_tokens == 12


@pytest.mark.parametrize("case", ["4t4i_post", "moe_8x_pre", "depth_4t4i_post"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"routing": CAUSAL}, {"routing": CALIBRATED}),
        ({"routing": CALIBRATED}, {"routing": CAUSAL}),
        ({"routing": CAUSAL}, {"routing": CAUSAL, "prompt_routing": CALIBRATED}),
        ({"routing": CALIBRATED}, {"routing": CALIBRATED, "prompt_routing": CAUSAL}),
    ],
)
def test_policies_share_nothing(
    checkpoint_for: CheckpointFor,
    alone: Alone,
    case: str,
    first: dict[str, Any],
    second: dict[str, Any],
) -> None:
    engine = make_engine(checkpoint_for(case))
    one = ask(LONG, max_tokens=6)
    same(engine, alone, one.but(**first), case)
    assert same(engine, alone, one.but(**second), case).num_cached_tokens == 0
    assert same(engine, alone, one.but(**first), case).num_cached_tokens == 12
    assert same(engine, alone, one.but(**second), case).num_cached_tokens == 12


def test_what_one_policy_generated_is_no_prompt_of_another(
    checkpoint_for: CheckpointFor, alone: Alone
) -> None:
    """The prompt is routed alike in both turns; the first answer was routed otherwise."""
    engine = make_engine(checkpoint_for("4t4i_post"))
    mixed: dict[str, Any] = {"routing": CAUSAL, "prompt_routing": CALIBRATED}
    for num_prompt in (11, 12, 13):
        prompt = (BOS, 20 + num_prompt, *LONG[2:num_prompt])
        answer = same(engine, alone, ask(prompt, max_tokens=8, **mixed))
        following = ask((*prompt, *answer.token_ids, 40), max_tokens=4, **mixed)
        assert same(engine, alone, following).num_cached_tokens == blocks_of(num_prompt)
        again = ask(prompt, max_tokens=4, routing=CALIBRATED)
        assert same(engine, alone, again).num_cached_tokens == blocks_of(num_prompt - 1)


@pytest.mark.parametrize("case", ["4t4i_post", "moe_8x_pre", "depth_4t4i_post"])
def test_expert_choice_shares_nothing(
    checkpoint_for: CheckpointFor, alone: Alone, case: str
) -> None:
    """What a token's experts are depends on the whole prompt, also for an equal beginning."""
    engine = make_engine(checkpoint_for(case))
    chosen = ask(LONG, max_tokens=6, prompt_routing=EXPERT_CHOICE)
    longer = ask((*LONG, 40), max_tokens=6, prompt_routing=EXPERT_CHOICE)
    causal = ask(LONG, max_tokens=6)
    for one in (chosen, chosen, longer, causal, chosen, longer):
        assert same(engine, alone, one, case).num_cached_tokens == 0
    assert same(engine, alone, causal, case).num_cached_tokens == 12
    asks = in_turn([ask(LONG, max_tokens=6)] * 6, prompt_routing=[EXPERT_CHOICE, None])
    answers = run(engine, asks)
    assert_all_equal(answers, alone(case, asks))
    assert [a.num_cached_tokens for (a,) in answers] == [0, 12] * 3
