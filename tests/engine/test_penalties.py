"""Penalties and min_tokens against the float64 reference, and with mates and without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from momaserve.config import RoutingPolicy
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import (
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    EOS,
    FIRST_CODE,
    NUM_CODES,
    PAD,
    make_engine,
)
from tests.engine.work import (
    GREEDY,
    PICTURE,
    WAYS,
    Alone,
    Answer,
    Ask,
    ask,
    assert_all_equal,
    assert_equal,
    cache_of,
    make_asks,
    run,
    run_one,
)
from tests.reference.moma_float64 import forward, load_checkpoint

CASES = ["4t4i_post", "moe_8x_pre", "depth_4t4i_post"]
PROMPT = (BOS, 30, 31, *PICTURE, 45, 46, 47, 57)
MARGIN = 1e-3
CODES = range(FIRST_CODE, FIRST_CODE + 16)
KINDS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.6},
    "reward": {"repetition_penalty": 0.8, "presence_penalty": -0.5},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "all": {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "with biases": {"repetition_penalty": 3.0, "logit_bias": {47: 4.0, 50: -3.0, 30: 6.0}},
    "with pictures": {
        "mode": "interleaved",
        "max_tokens": 20,
        "logit_bias": {BEGIN_IMAGE: 5.0},
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.5,
    },
}


def text_scores(one: Ask, logits: Any, tokens: list[int], num_output: int) -> Any:
    """Scores of the next word, id by id: mask, bias, penalties."""
    params = one.params
    counts = {i: tokens[len(one.prompt) :].count(i) for i in range(64)}
    budget = (params.max_tokens or 0) - num_output
    may_draw = params.mode == "interleaved" and budget >= NUM_CODES + 2
    banned = {BOS, PAD, END_IMAGE, *CODES} | (set() if may_draw else {BEGIN_IMAGE})
    if params.ignore_eos or num_output < params.min_tokens:
        banned.add(EOS)
    if num_output < params.min_tokens:
        banned |= set(params.stop_token_ids)
    scores = np.full(64, -np.inf)
    for i in set(range(64)) - banned:
        score = logits[i] + params.logit_bias.get(i, 0.0)
        if i in tokens:
            score = (
                score / params.repetition_penalty
                if score > 0
                else score * params.repetition_penalty
            )
        if counts[i]:
            score -= params.presence_penalty + params.frequency_penalty * counts[i]
        scores[i] = score
    return scores


def assert_penalised(checkpoint_for: CheckpointFor, case: str, one: Ask, answer: Answer) -> int:
    """Checks every token of a greedy answer; returns how many are not the likeliest words."""
    config, weights = load_checkpoint(checkpoint_for(case))
    tokens = [*one.prompt, *answer.token_ids]
    logits = forward(config, weights, tokens)
    num_changed = 0
    for position in range(len(one.prompt), len(tokens)):
        token, before = tokens[position], tokens[:position]
        raw = logits[position - 1]
        if token == END_IMAGE:
            continue
        if token in CODES:  # as it would be without any penalty
            assert raw[token] > max(raw[i] for i in CODES) - MARGIN
            continue
        scores = text_scores(one, raw, before, position - len(one.prompt))
        assert scores[token] > scores.max() - MARGIN
        num_changed += int(np.argmax(raw)) != token
    return num_changed


@pytest.mark.parametrize("case", CASES)
def test_greedy_words_are_those_of_penalised_logits(
    checkpoint_for: CheckpointFor, alone: Alone, case: str
) -> None:
    asks = [ask(PROMPT, **{"max_tokens": 14, **fields}) for fields in KINDS.values()]
    answers = run(make_engine(checkpoint_for(case)), asks)
    for one, (answer,) in zip(asks, answers, strict=True):
        assert assert_penalised(checkpoint_for, case, one, answer) > 0
    assert answers[-1][0].token_ids.count(BEGIN_IMAGE) > 0
    assert_all_equal(answers, alone(case, asks))
    plain = run(make_engine(checkpoint_for(case)), [ask(PROMPT, max_tokens=14)])[0][0]
    assert all(answer.token_ids != plain.token_ids for (answer,) in answers)


def test_neutral_penalties_are_none(checkpoint_for: CheckpointFor, alone: Alone) -> None:
    one = ask(PROMPT, max_tokens=10)
    neutral = one.but(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=-0.0)
    answer = run_one(make_engine(checkpoint_for("4t4i_post")), neutral)
    assert_all_equal([[answer]], alone("4t4i_post", [one]))


# --- min_tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("min_tokens", range(5))
def test_nothing_ends_an_answer_before_min_tokens(
    checkpoint_for: CheckpointFor, min_tokens: int
) -> None:
    """eos and a stop token are made likely; each is drawn as soon as it may be."""
    engine = make_engine(checkpoint_for("4t4i_post"))
    for end in (EOS, 50):
        one = ask(
            PROMPT,
            max_tokens=8,
            min_tokens=min_tokens,
            logit_bias={end: 100.0},
            stop_token_ids=(50, 51),
            ignore_eos=False,
        )
        answer = run_one(engine, one)
        assert len(answer.token_ids) == min_tokens
        assert answer.finish_reason == "stop"
        assert not {EOS, 50, 51} & {*answer.token_ids}
        assert_penalised(checkpoint_for, "4t4i_post", one, answer)


def test_all_of_max_tokens_may_be_min_tokens(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    fields: dict[str, Any] = {"ignore_eos": False, "logit_bias": {EOS: 100.0}}
    answer = run_one(engine, ask(PROMPT, max_tokens=6, min_tokens=6, **fields))
    assert (len(answer.token_ids), answer.finish_reason) == (6, "length")


def test_codes_of_a_picture_count_as_tokens(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    one = ask(
        (BOS, 30, *PICTURE[:3]),  # half a picture, of which three tokens are left
        mode="interleaved",
        max_tokens=9,
        min_tokens=4,
        ignore_eos=False,
        logit_bias={EOS: 100.0, BEGIN_IMAGE: -100.0},
    )
    answer = run_one(engine, one)
    assert len(answer.token_ids) == 4
    assert answer.token_ids[2] == END_IMAGE


# --- pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [GREEDY, WAYS[1]], ids=["greedy", "drawn"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_pictures_are_not_penalised(
    checkpoint_for: CheckpointFor, alone: Alone, way: Any, guidance_scale: float
) -> None:
    plain = ask(PROMPT, mode="image", image=way, guidance_scale=guidance_scale)
    engine = make_engine(checkpoint_for("4t4i_post"))
    for fields in KINDS.values():
        changes = {n: v for n, v in fields.items() if n.endswith("penalty")}
        answer = run_one(engine, plain.but(**changes))
        assert_all_equal([[answer]], alone("4t4i_post", [plain]))


def test_min_tokens_bans_no_code_of_a_picture(checkpoint_for: CheckpointFor) -> None:
    """A stop token does not end a picture, so there is no reason to keep it out of one."""
    engine = make_engine(checkpoint_for("4t4i_post"))
    plain = run_one(engine, ask(PROMPT, mode="image"))
    codes = tuple(plain.token_ids[1:5])
    stopped = run_one(engine, ask(PROMPT, mode="image", stop_token_ids=codes))
    assert stopped.token_ids == plain.token_ids
    late = run_one(engine, ask(PROMPT, mode="image", stop_token_ids=codes, min_tokens=6))
    assert late.token_ids == plain.token_ids


# --- what must not change them -------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_mates_chunks_hits_and_preemptions_change_nothing(
    checkpoint_for: CheckpointFor, alone: Alone, case: str
) -> None:
    checkpoint = checkpoint_for(case)
    asks = [
        ask(PROMPT, **{"max_tokens": 14, "seed": index, "text": WAYS[index % 3], **fields})
        for index, fields in enumerate(KINDS.values())
    ]
    asks += [asks[0].but(prompt_routing=RoutingPolicy.EXPERT_CHOICE, n=2)]
    mates = make_asks(checkpoint, 6, first=10)
    wanted = alone(case, [*asks, *mates])
    warm = make_engine(checkpoint)
    assert_all_equal(run(warm, [*asks, *mates]), wanted)
    again = run(warm, [*asks, *mates], per_step=3)
    assert_all_equal(again, wanted)
    assert again[0][0].num_cached_tokens == 12
    assert_all_equal(run(make_engine(checkpoint, max_num_step_tokens=16), asks), wanted[:8])
    for plan_ahead in (False, True):
        tight = make_engine(checkpoint, **cache_of(checkpoint, 18), plan_ahead=plan_ahead)
        preempted: list[int] = []

        def count(_: int, tight: Any = tight, preempted: list[int] = preempted) -> None:
            requests = tight.scheduler.requests.values()
            preempted.append(max((r.num_preemptions for r in requests), default=0))

        assert_all_equal(run(tight, asks, between=count), wanted[:8])
        assert max(preempted) > 0


def test_penalties_of_one_leave_others_alone(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    plain = ask(PROMPT, max_tokens=10)
    wanted = run_one(engine, plain)
    asks = [plain.but(repetition_penalty=5.0), plain, plain.but(frequency_penalty=2.0), plain]
    answers = run(engine, asks)
    for (answer,) in answers[1::2]:
        assert_equal(answer, wanted)
    assert all(answer.token_ids != wanted.token_ids for (answer,) in answers[::2])
