"""Everything that can refuse a request or a configuration, with what the message says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from momaserve.config import EngineConfig, RoutingPolicy
from momaserve.engine import Engine
from momaserve.errors import (
    CheckpointError,
    ConfigError,
    PromptError,
    QueueFullError,
    RequestError,
    SamplingError,
)
from momaserve.outputs import FinishReason
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.tokens.prompt import Prompt
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import (
    BEGIN_IMAGE,
    END_IMAGE,
    WORDS,
    answer,
    make_engine,
    reason_of,
    run_until_idle,
    submit,
    tokens_of,
)
from tests.reference.checkpoints import CASES, random_checkpoint

PICTURE = [BEGIN_IMAGE, 4, 5, 6, 7, END_IMAGE]
CAUSAL, CALIBRATED = RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED
EXPERT_CHOICE, THRESHOLD = RoutingPolicy.EXPERT_CHOICE, RoutingPolicy.THRESHOLD


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


@pytest.fixture
def short(checkpoint_for: CheckpointFor) -> Engine:
    """At most 16 tokens of prompt and output together, 4 of them computed in a step."""
    return make_engine(checkpoint_for("4t4i_post"), max_model_len=16, max_num_step_tokens=4)


# --- length --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [16, 17, 300])
def test_a_prompt_that_leaves_no_room(short: Engine, num_tokens: int) -> None:
    message = (
        f"the prompt has {num_tokens} tokens, but prompt and output together may have at most 16"
    )
    assert_refused(short, PromptError, message, "prompt", [30] * num_tokens)


def test_a_prompt_that_is_only_scored_may_fill_the_context(short: Engine) -> None:
    assert answer(short, [30] * 16, max_tokens=0) == []
    message = "the prompt has 17 tokens"
    assert_refused(short, PromptError, message, "prompt", [30] * 17, max_tokens=0)


def test_more_max_tokens_than_room_is_no_error(short: Engine) -> None:
    for max_tokens in (12, 1000, None):
        assert len(answer(short, max_tokens=max_tokens, ignore_eos=True)) == 16 - len(WORDS)


def test_an_empty_prompt(short: Engine) -> None:
    assert_refused(short, PromptError, "the prompt has no tokens", "prompt", [])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([0, 64], "prompt token at position 1 must be an integer from 0 to 63, got 64"),
        ([-1], "position 0 must be an integer from 0 to 63, got -1"),
        ([0, 30, 5], "prompt position 2: image id 5 outside a picture"),
        ([0, END_IMAGE], "prompt position 1: end_image 20 outside a picture"),
        ([0, BEGIN_IMAGE, 30], "id 30 inside a picture that has 0 of its 4 image ids"),
        ([0, *PICTURE[:-1]], "the prompt ends after the 4 image ids of a picture"),
    ],
)
def test_a_malformed_prompt(short: Engine, prompt: list[int], message: str) -> None:
    assert_refused(short, PromptError, message, "prompt", prompt)


# --- pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_a_picture_without_room(short: Engine, max_tokens: int) -> None:
    message = f"a picture takes 6 tokens, but max_tokens and the context leave {max_tokens}"
    fields: dict[str, Any] = {"mode": OutputMode.IMAGE, "max_tokens": max_tokens}
    assert_refused(short, SamplingError, message, "max_tokens", **fields)


def test_a_picture_that_the_context_has_no_room_for(short: Engine) -> None:
    message = "a picture takes 6 tokens, but max_tokens and the context leave 5"
    fields: dict[str, Any] = {"mode": OutputMode.IMAGE}
    assert_refused(short, SamplingError, message, "max_tokens", [30] * 11, **fields)
    drawn = answer(short, [30] * 10, **fields)
    assert (len(drawn), drawn[0], drawn[-1]) == (6, BEGIN_IMAGE, END_IMAGE)


@pytest.mark.parametrize("mode", OutputMode)
def test_the_rest_of_a_picture_without_room(short: Engine, mode: OutputMode) -> None:
    prompt = [0, 30, BEGIN_IMAGE, 4]
    message = "the rest of the prompt's picture takes 4 tokens, but max_tokens and the context"
    fields: dict[str, Any] = {"mode": mode, "max_tokens": 3}
    assert_refused(short, SamplingError, message, "max_tokens", prompt, **fields)
    assert len(answer(short, prompt, mode=mode, max_tokens=4)) == 4


@pytest.mark.parametrize("mode", [OutputMode.IMAGE, OutputMode.INTERLEAVED])
def test_a_checkpoint_without_pictures(checkpoint_for: CheckpointFor, mode: OutputMode) -> None:
    engine = make_engine(checkpoint_for("no_image_post"))
    message = "this checkpoint makes no pictures"
    assert_refused(engine, SamplingError, message, "modalities", [0, 30], mode=mode)


# --- sampling ------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, 64, 10**30])
@pytest.mark.parametrize("name", ["stop_token_ids", "logit_bias"])
def test_ids_out_of_range(short: Engine, name: str, token: int) -> None:
    value: Any = (3, token) if name == "stop_token_ids" else {3: 1.0, token: 1.0}
    message = f"{name}: token id {token} is not between 0 and 63"
    assert_refused(short, SamplingError, message, name, **{name: value})


def test_the_outermost_ids_are_in_range(short: Engine) -> None:
    fields: dict[str, Any] = {"stop_token_ids": (0, 63), "logit_bias": {0: 1.0, 63: -1.0}}
    assert len(answer(short, max_tokens=1, **fields)) <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "n must be between 1 and 16, got 0"),
        ({"n": 17}, "n must be between 1 and 16, got 17"),
        ({"max_tokens": -1}, "max_tokens must be at least 0, got -1"),
        ({"seed": -1}, "seed must be between 0 and 9223372036854775807, got -1"),
        ({"seed": 2**63}, "seed must be between 0 and 9223372036854775807"),
        ({"logprobs": 21}, "logprobs must be between 0 and 20, got 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be between 0 and 20, got -1"),
        ({"logit_bias": {3: 100.5}}, "logit_bias must be between -100 and 100, got 100.5"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias must be between -100 and 100, got nan"),
        ({"logit_bias": dict.fromkeys(range(301), 0.0)}, "at most 300 entries, got 301"),
        ({"stop": ("",)}, "each stop string must have 1 to 256 characters, got 0"),
        ({"stop": ("a",) * 9}, "stop must have at most 8 strings, got 9"),
        ({"stop_token_ids": (3,) * 65}, "stop_token_ids must have at most 64 ids, got 65"),
        ({"routing": EXPERT_CHOICE}, "routing must be one of ['causal', 'calibrated']"),
        ({"routing": THRESHOLD}, "routing must be one of ['causal', 'calibrated']"),
        ({"prompt_routing": THRESHOLD}, "prompt_routing must be one of ['causal', 'calibrated',"),
        ({"routing": "nearest"}, "routing must be one of ['causal', 'calibrated'], got nearest"),
        ({"mode": "film"}, "mode must be one of ['text', 'image', 'interleaved'], got film"),
    ],
)
def test_a_parameter_out_of_its_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=re.escape(message)) as caught:
        SamplingParams(**fields)
    assert caught.value.param == next(iter(fields))


def test_names_of_modes_and_policies_are_taken_for_them(short: Engine) -> None:
    """A plain string equals its enum, so that it must also mean the same."""
    params: dict[str, Any] = {"mode": "image", "routing": "calibrated", "prompt_routing": "causal"}
    made = SamplingParams(**params)
    assert made.mode is OutputMode.IMAGE
    assert (made.routing, made.prompt_routing) == (CALIBRATED, CAUSAL)
    named = [answer(short, max_tokens=6, ignore_eos=True, routing=p) for p in ("causal", CAUSAL)]
    assert named[0] == named[1]
    drawn = answer(short, mode="image")
    assert (len(drawn), drawn[0], drawn[-1]) == (6, BEGIN_IMAGE, END_IMAGE)


# --- routing -------------------------------------------------------------------------------


def bare_checkpoint(directory: Path, **parts: bool) -> Path:
    random_checkpoint(directory, seed=1, **{**CASES["4t4i_post"], **parts})
    return directory


@pytest.mark.parametrize(
    ("parts", "policy", "message"),
    [
        ({"aux_routers": False}, CAUSAL, "has no auxiliary routers, which causal routing needs"),
        ({"thresholds": False}, CALIBRATED, "has no router thresholds, which calibrated routing"),
    ],
)
def test_a_policy_that_the_checkpoint_lacks(
    tmp_path: Path, parts: dict[str, bool], policy: RoutingPolicy, message: str
) -> None:
    checkpoint = bare_checkpoint(tmp_path, **parts)
    asked: list[dict[str, Any]] = [
        {"routing": policy},
        {"routing": THRESHOLD, "prompt_routing": policy},
    ]
    for options in asked:
        with pytest.raises(CheckpointError, match=message) as caught:
            make_engine(checkpoint, **options)
        assert "momaserve fit-routers" in str(caught.value)
    engine = make_engine(checkpoint, routing=THRESHOLD)
    assert_refused(engine, RequestError, message, "routing", routing=policy)
    assert_refused(engine, RequestError, message, "prompt_routing", prompt_routing=policy)
    assert len(answer(engine, max_tokens=3, ignore_eos=True)) == 3


def test_an_expert_choice_prompt_longer_than_a_step(short: Engine) -> None:
    message = (
        "prompt_routing expert_choice computes the prompt in one step of at most 4 tokens "
        "(max_num_step_tokens), got 5"
    )
    assert_refused(short, PromptError, message, None, prompt_routing=EXPERT_CHOICE)
    fields: dict[str, Any] = {"prompt_routing": EXPERT_CHOICE, "mode": OutputMode.IMAGE}
    assert len(answer(short, WORDS[:4], **fields)) == 6  # the forced begin_image comes after


def test_an_engine_does_not_route_generated_tokens_by_expert_choice() -> None:
    with pytest.raises(ConfigError, match="routing must not be expert_choice"):
        EngineConfig(routing=EXPERT_CHOICE)
    assert EngineConfig(prompt_routing=EXPERT_CHOICE).prompt_routing is EXPERT_CHOICE


def test_an_engine_takes_the_names_of_policies(checkpoint_for: CheckpointFor) -> None:
    named: Any = "causal"
    engine = make_engine(checkpoint_for("4t4i_post"), routing=named, prompt_routing="expert_choice")
    assert engine.config.routing is CAUSAL
    assert engine.config.prompt_routing is EXPERT_CHOICE
    same = make_engine(checkpoint_for("4t4i_post"), prompt_routing=EXPERT_CHOICE)
    fields: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}
    assert answer(engine, **fields) == answer(same, **fields)
    with pytest.raises(ConfigError, match="routing must be one of .*, got 'nearest'"):
        make_engine(checkpoint_for("4t4i_post"), routing="nearest")


# --- memory and queue ----------------------------------------------------------------------


def test_a_request_that_the_cache_could_never_hold(checkpoint_for: CheckpointFor) -> None:
    two_layers_of_kv = 2 * 2 * 32 * 4  # bytes per token of 4 heads of 8
    engine = make_engine(checkpoint_for("4t4i_post"), kv_cache_bytes=3 * 4 * two_layers_of_kv)
    message = (
        "13 tokens (prompt and max_tokens) need 4 KV blocks of 4 tokens, but the KV cache has 3"
    )
    assert_refused(engine, PromptError, message, None, max_tokens=8)
    assert len(answer(engine, max_tokens=7, ignore_eos=True)) == 7


def test_requests_beyond_the_queue(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_queued_requests=2)
    submit(engine, "a", max_tokens=2)
    with pytest.raises(QueueFullError, match=r"the queue holds 1 requests; 2 more would exceed"):
        submit(engine, "b", max_tokens=2, n=2)
    submit(engine, "c", max_tokens=2)
    with pytest.raises(QueueFullError, match=r"limit of 2 \(max_queued_requests\)"):
        submit(engine, "d", max_tokens=2)
    outputs = run_until_idle(engine)
    assert {output.request_id for output in outputs} == {"a", "c"}
    submit(engine, "d", max_tokens=2)
    assert reason_of(run_until_idle(engine), "d") in (FinishReason.LENGTH, FinishReason.STOP)


def test_tokens_beyond_the_queue(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_queued_tokens=9)
    submit(engine, "a", max_tokens=2)
    with pytest.raises(QueueFullError, match=r"the queue holds 5 tokens; 5 more .* limit of 9"):
        submit(engine, "b", max_tokens=2)
    with pytest.raises(RequestError, match=r"brings 10 tokens .* never holds more than 9"):
        submit(engine, "c", max_tokens=2, n=2)
    assert {output.request_id for output in run_until_idle(engine)} == {"a"}


def test_a_name_in_use(engine: Engine) -> None:
    submit(engine, "a", max_tokens=2, ignore_eos=True)
    with pytest.raises(RequestError, match="request id 'a' is already in use"):
        submit(engine, "a", max_tokens=2)
    assert len(tokens_of(run_until_idle(engine), "a")) == 2


# --- configuration -------------------------------------------------------------------------


def test_a_context_longer_than_the_checkpoint_allows(checkpoint_for: CheckpointFor) -> None:
    message = "max_model_len 257 is more than the checkpoint's max_position_embeddings 256"
    with pytest.raises(ConfigError, match=message):
        make_engine(checkpoint_for("4t4i_post"), max_model_len=257)
    assert make_engine(checkpoint_for("4t4i_post"), max_model_len=256).max_model_len == 256
    assert make_engine(checkpoint_for("4t4i_post")).max_model_len == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "tpu"}, "device must be one of"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"max_model_len": 0}, "max_model_len must be at least 1, got 0"),
        ({"block_size": 3}, "block_size must be a power of two, got 3"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes must be positive, got 0"),
        ({"kv_cache_bytes": 7}, "kv_cache_bytes 7 is less than one block, 2048 bytes"),
        ({"max_num_requests": 0}, "max_num_requests must be at least 1, got 0"),
        ({"max_num_step_tokens": -1}, "max_num_step_tokens must be at least 1, got -1"),
    ],
)
def test_a_setting_that_cannot_work(
    checkpoint_for: CheckpointFor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(checkpoint_for("4t4i_post"), **options)


def test_make_submission_changes_nothing(engine: Engine) -> None:
    """Any thread may call it while another steps the engine."""
    submission = engine.make_submission(Prompt(tuple(WORDS)), SamplingParams(n=3, seed=5), "r")
    assert submission.request_ids == ("r-0", "r-1", "r-2")
    assert submission.seed == 5
    assert not engine.has_work
    fresh = [engine.make_submission(Prompt((0,)), SamplingParams(), "r").seed for _ in range(2)]
    assert fresh[0] != fresh[1]
