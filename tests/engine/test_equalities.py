"""A request's answer depends on nothing but itself: batch mates, chunks, streaming."""

from __future__ import annotations

import pytest

from momaserve import LLM
from momaserve.config import RoutingPolicy
from momaserve.sampling import OutputMode
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import BEGIN_IMAGE, END_IMAGE, NUM_CODES, make_engine
from tests.engine.work import (
    PICTURE,
    PROMPT_POLICIES,
    SHAPES,
    TOLERANCE,
    WAYS,
    Alone,
    Ask,
    ask,
    assert_all_equal,
    in_turn,
    make_asks,
    run,
    run_one,
    unguided,
    values_of,
)


def test_work_is_of_every_kind(checkpoint_for: CheckpointFor, alone: Alone) -> None:
    """Else the equalities below would say less than they seem to."""
    asks = make_asks(checkpoint_for("4t4i_post"), 32)
    modes = {a.params.mode for a in asks if a.params.guidance_scale != 1}
    assert modes == set(OutputMode)
    assert {(a.params.text, a.params.mode) for a in asks} >= {(WAYS[0], m) for m in OutputMode}
    answers = [answer for (answer,) in alone("4t4i_post", asks)]
    interleaved = [
        a.token_ids
        for one, a in zip(asks, answers, strict=True)
        if one.params.mode is OutputMode.INTERLEAVED
    ]
    assert sum(tokens.count(BEGIN_IMAGE) for tokens in interleaved) >= 4
    assert any(set(tokens) & set(range(22, 64)) for tokens in interleaved)
    assert {str(a.finish_reason) for a in answers} == {"stop", "length"}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("case", SHAPES)
def test_alone_equals_batched(
    checkpoint_for: CheckpointFor, alone: Alone, case: str, prefix_caching: bool, backend: str
) -> None:
    """Also where they are computed by different backends."""
    asks = make_asks(checkpoint_for(case), 32)
    wanted = alone(case, asks)
    engine = make_engine(
        checkpoint_for(case), backend=backend, prefix_caching=prefix_caching, max_num_requests=64
    )
    for first, stop in ((3, 4), (9, 16), (0, 32)):
        assert_all_equal(run(engine, asks[first:stop]), wanted[first:stop])


@pytest.mark.parametrize("case", ["4t4i_post", "moe_8x_pre", "depth_4t4i_post"])
def test_mates_of_other_policies_change_nothing(
    checkpoint_for: CheckpointFor, alone: Alone, case: str
) -> None:
    asks = in_turn(make_asks(checkpoint_for(case), 12), prompt_routing=PROMPT_POLICIES)
    engine = make_engine(checkpoint_for(case))
    assert_all_equal(run(engine, asks, per_step=3), alone(case, asks))


@pytest.mark.parametrize("step_tokens", [1, 3, 16])
@pytest.mark.parametrize("case", SHAPES)
def test_whole_equals_chunked(
    checkpoint_for: CheckpointFor, alone: Alone, case: str, step_tokens: int
) -> None:
    asks = make_asks(checkpoint_for(case), 8)
    if step_tokens == 1:
        asks = unguided(asks)
    engine = make_engine(checkpoint_for(case), max_num_step_tokens=step_tokens)
    assert_all_equal(run(engine, asks), alone(case, asks))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("step_tokens", [2, 3, 5, 16])
def test_prompt_logprobs_of_a_chunked_prompt(
    checkpoint_for: CheckpointFor, alone: Alone, step_tokens: int, guidance_scale: float
) -> None:
    """Those of a prompt with guidance too, whose companions are no part of it."""
    asks = [
        ask([0, *range(30, 37)], mode="image", guidance_scale=guidance_scale, prompt_logprobs=0),
        ask([0, 30, *PICTURE[:3]], guidance_scale=guidance_scale, prompt_logprobs=2, max_tokens=6),
    ]
    for one, (answer,) in zip(asks, alone("4t4i_post", asks), strict=True):
        assert [e.token_id for e in answer.prompt_logprobs or ()] == list(one.prompt[1:])
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_step_tokens=step_tokens)
    assert_all_equal(run(engine, asks), alone("4t4i_post", asks))


# --- expert choice over a prompt -----------------------------------------------------------


def expert_choice_asks(checkpoint_for: CheckpointFor, case: str) -> list[Ask]:
    asks = make_asks(checkpoint_for(case), 9)
    return in_turn(asks, prompt_routing=[RoutingPolicy.EXPERT_CHOICE])


@pytest.mark.parametrize("case", ["4t4i_post", "moe_8x_pre", "depth_4t4i_post"])
def test_expert_choice_prompts_do_not_see_their_batch_mates(
    checkpoint_for: CheckpointFor, alone: Alone, case: str
) -> None:
    asks = expert_choice_asks(checkpoint_for, case)
    assert_all_equal(run(make_engine(checkpoint_for(case)), asks), alone(case, asks))


def test_expert_choice_over_the_batch_would_break_the_equality(
    checkpoint_for: CheckpointFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: were the scope the whole batch, mates would change the answer."""
    from momaserve.kernels import reference

    asks = expert_choice_asks(checkpoint_for, "4t4i_post")
    engine = make_engine(checkpoint_for("4t4i_post"))
    own_scope = reference.expert_choice

    def one_scope(logits, eligible, segments, num_segments, capacity):  # type: ignore[no-untyped-def]
        return own_scope(logits, eligible, segments.clamp_max(0), 1, capacity)

    monkeypatch.setattr(reference, "expert_choice", one_scope)
    by_itself = [[run_one(engine, one)] for one in asks]
    with pytest.raises(AssertionError):
        assert_all_equal(run(engine, asks), by_itself)
    monkeypatch.setattr(reference, "expert_choice", own_scope)
    by_itself = [[run_one(engine, one)] for one in asks]
    assert_all_equal(run(engine, asks), by_itself)


# --- streams and pictures ------------------------------------------------------------------


def test_streamed_outputs_join_to_the_whole(checkpoint_for: CheckpointFor) -> None:
    asks = make_asks(checkpoint_for("4t4i_post"), 9)
    llm = LLM(checkpoint_for("4t4i_post"), dtype="float32", block_size=4)
    whole = llm.generate([list(a.prompt) for a in asks], [a.params for a in asks])
    streamed = run(make_engine(checkpoint_for("4t4i_post"), max_num_requests=4), asks)
    for result, (answer,) in zip(whole, streamed, strict=True):
        (choice,) = result.choices
        assert answer.token_ids == choice.token_ids
        assert values_of(answer.logprobs) == pytest.approx(
            values_of(choice.logprobs), abs=TOLERANCE
        )
        assert answer.finish_reason is choice.finish_reason
    assert any(answer.num_outputs > 1 for (answer,) in streamed)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_pictures_are_whole(checkpoint_for: CheckpointFor, guidance_scale: float) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    image = engine.model_config.image
    assert image is not None
    drawn = ask([0, 30, 31], mode="image", image=WAYS[1], n=3, guidance_scale=guidance_scale)
    (answers,) = run(engine, [drawn])
    for answer in answers:
        begin, *codes, end = answer.token_ids
        assert (begin, end) == (BEGIN_IMAGE, END_IMAGE)
        assert len(codes) == NUM_CODES
        assert all(image.first_token_id <= code < image.stop_token_id for code in codes)
        assert answer.finish_reason == "stop"


@pytest.mark.parametrize("num_codes", range(NUM_CODES))
def test_a_picture_of_the_prompt_is_continued(
    checkpoint_for: CheckpointFor, num_codes: int
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    prompt = [0, 30, *PICTURE[: 1 + num_codes]]
    answer = run_one(engine, ask(prompt, mode="image"))
    assert len(answer.token_ids) == NUM_CODES - num_codes + 1
    assert answer.token_ids[-1] == END_IMAGE
