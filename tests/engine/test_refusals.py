"""What guidance, min_tokens and n can ask too much of; `test_limits` has the other refusals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from momaserve.config import RoutingPolicy
from momaserve.engine import Engine
from momaserve.errors import PromptError, QueueFullError, RequestError, SamplingError
from momaserve.sampling import SamplingParams
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import BEGIN_IMAGE, EOS, WORDS, answer, make_engine, run_until_idle, submit
from tests.engine.work import GREEDY, PICTURE, cache_of

TEXT_IDS = [3, *range(22, 64)]
"""Those of the checkpoint that may be sampled as words, without eos."""
EXPERT_CHOICE = RoutingPolicy.EXPERT_CHOICE
GUIDED: dict[str, Any] = {"mode": "image", "guidance_scale": 2.0}


def assert_refused(
    engine: Engine,
    error: type[RequestError],
    message: str,
    param: str | None,
    prompt: Sequence[int] = WORDS,
    **fields: Any,
) -> None:
    """`message` is a part of what the error says; nothing of the request stays behind."""
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        submit(engine, "refused", prompt, **fields)
    assert type(caught.value) is error
    assert caught.value.param == param
    assert not engine.has_work


# --- guidance ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_num_requests", "max_num_step_tokens"])
@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_guidance_takes_two_sequences(checkpoint_for: CheckpointFor, name: str, mode: str) -> None:
    one: dict[str, Any] = {name: 1}
    engine = make_engine(checkpoint_for("4t4i_post"), **one)
    message = f"guidance makes 2 sequences of one answer, but at most 1 may run ({name})"
    fields: dict[str, Any] = {"guidance_scale": 2.0, "max_tokens": 8}
    assert_refused(engine, RequestError, message, "guidance_scale", mode=mode, **fields)
    begun = [*WORDS, *PICTURE[:2]]
    assert_refused(engine, RequestError, message, "guidance_scale", begun, mode="text", **fields)
    assert len(answer(engine, mode="text", ignore_eos=True, **fields)) == 8
    assert len(answer(engine, mode=mode, max_tokens=6, guidance_scale=1, ignore_eos=True)) == 6


def test_a_companion_takes_room_in_the_cache(checkpoint_for: CheckpointFor) -> None:
    checkpoint = checkpoint_for("4t4i_post")
    engine = make_engine(checkpoint, **cache_of(checkpoint, 4))
    message = (
        "11 tokens (prompt and max_tokens) and 1 x 6 of guidance need 5 KV blocks of 4 tokens, "
        "but the KV cache has 4"
    )
    assert_refused(engine, PromptError, message, None, max_tokens=6, **GUIDED)
    assert len(answer(engine, max_tokens=6, mode="image")) == 6
    roomy = make_engine(checkpoint, **cache_of(checkpoint, 5))
    assert len(answer(roomy, max_tokens=6, **GUIDED)) == 6


def test_no_max_tokens_leaves_room_for_the_companion(checkpoint_for: CheckpointFor) -> None:
    checkpoint = checkpoint_for("4t4i_post")
    engine = make_engine(checkpoint, **cache_of(checkpoint, 6))
    talks: dict[str, Any] = {"mode": "interleaved", "text": GREEDY, "ignore_eos": True}
    assert len(answer(engine, guidance_scale=2.0, **talks)) == 16 - len(WORDS)
    assert len(answer(engine, **talks)) == 24 - len(WORDS)
    message = "a picture takes 6 tokens, but max_tokens and the context leave 1"
    assert_refused(engine, SamplingError, message, "max_tokens", [30] * 16, **GUIDED)


def test_a_prompt_of_expert_choice_and_its_companion_in_one_step(
    checkpoint_for: CheckpointFor,
) -> None:
    """The step that ends such a prompt samples, so it has the companion's tokens too."""
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_step_tokens=9)
    prompt = [0, 30, 31, 32, *PICTURE[:3]]  # 7 tokens; the companion has 4
    message = (
        "prompt_routing expert_choice computes the prompt in one step of at most 9 tokens "
        "(max_num_step_tokens), got 11"
    )
    fields: dict[str, Any] = {"prompt_routing": EXPERT_CHOICE, **GUIDED}
    assert_refused(engine, PromptError, message, None, prompt, **fields)
    assert len(answer(engine, prompt, prompt_routing=EXPERT_CHOICE, mode="image")) == 3
    assert len(answer(engine, prompt[2:], **fields)) == 3
    assert len(answer(engine, [30] * 9, **fields)) == 6  # begin_image can come a step later


# --- min_tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_min_tokens_without_a_word_to_sample(checkpoint_for: CheckpointFor, mode: str) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    message = "min_tokens: this checkpoint's vocabulary has no text token to sample but those"
    fields: dict[str, Any] = {"min_tokens": 1, "max_tokens": 8, "mode": mode}
    every = tuple(TEXT_IDS)
    assert_refused(engine, SamplingError, message, "min_tokens", stop_token_ids=every, **fields)
    left = answer(engine, stop_token_ids=every[1:], **{**fields, "mode": "text"})
    assert left == [every[0]] * len(left)
    assert left
    assert len(answer(engine, stop_token_ids=every, **{**fields, "mode": "image"})) == 6
    ended = answer(engine, stop_token_ids=every, **{**fields, "min_tokens": 0, "mode": "text"})
    assert ended == []


def test_min_tokens_beyond_max_tokens() -> None:
    message = "min_tokens must be at most max_tokens 3, got 4"
    with pytest.raises(SamplingError, match=message) as caught:
        SamplingParams(min_tokens=4, max_tokens=3)
    assert caught.value.param == "min_tokens"


def test_min_tokens_beyond_the_context(checkpoint_for: CheckpointFor) -> None:
    """Like max_tokens, it is what is wished for: the context ends the answer."""
    engine = make_engine(checkpoint_for("4t4i_post"), max_model_len=9)
    tokens = answer(engine, min_tokens=50, logit_bias={EOS: 100.0})
    assert len(tokens) == 9 - len(WORDS)


# --- samples -------------------------------------------------------------------------------


def test_more_samples_than_the_queue_ever_holds(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_queued_requests=3)
    message = (
        "the request brings 4 requests (n counts n) to a queue that never holds more than 3 "
        "(max_queued_requests)"
    )
    assert_refused(engine, RequestError, message, None, n=4, max_tokens=2)
    submit(engine, "r", n=3, max_tokens=2, ignore_eos=True)
    with pytest.raises(QueueFullError, match="the queue holds 3 requests; 1 more would exceed"):
        submit(engine, "s", max_tokens=2)
    assert len(run_until_idle(engine)) == 6


def test_names_of_samples_are_names_in_use(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    submit(engine, "r-1", max_tokens=2)
    with pytest.raises(RequestError, match="request id 'r-1' is already in use"):
        submit(engine, "r", n=2, max_tokens=2)
    assert list(engine.scheduler.requests) == ["r-1"]
    assert {output.request_id for output in run_until_idle(engine)} == {"r-1"}


def test_requests_that_were_preempted_are_not_turned_away(
    checkpoint_for: CheckpointFor,
) -> None:
    """They wait again, and count for no limit of the queue."""
    checkpoint = checkpoint_for("4t4i_post")
    engine = make_engine(checkpoint, **cache_of(checkpoint, 5), max_queued_requests=2)
    fields: dict[str, Any] = {"max_tokens": 12, "text": GREEDY, "ignore_eos": True}
    submit(engine, "a", **fields)
    submit(engine, "b", cache_salt="x", **fields)
    outputs = []
    while not any(r.num_preemptions for r in engine.scheduler.requests.values()):
        outputs += engine.step()
    assert engine.scheduler.num_waiting == 1
    submit(engine, "c", **fields)
    submit(engine, "d", **fields)
    with pytest.raises(QueueFullError, match="the queue holds 2 requests"):
        submit(engine, "e", **fields)
    outputs += run_until_idle(engine)
    assert sorted(o.request_id for o in outputs if o.finish_reason) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("token", [BEGIN_IMAGE, EOS])
def test_a_picture_only_answer_needs_no_words(checkpoint_for: CheckpointFor, token: int) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"))
    fields: dict[str, Any] = {"stop_token_ids": (token,), "min_tokens": 3, "ignore_eos": True}
    assert len(answer(engine, mode="image", **fields)) == 6
