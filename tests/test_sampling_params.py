"""One test per rule of `SamplingParams`: what is refused, by which name, with which limit."""

from __future__ import annotations

import math
from typing import Any

import pytest

from momaserve.errors import SamplingError
from momaserve.sampling import MAX_SEED, Distribution, SamplingParams


def assert_refused(message: str, param: str, **fields: Any) -> None:
    """`message` is all that the error says."""
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**fields)
    assert str(caught.value) == message
    assert caught.value.param == param


# --- numbers out of range ------------------------------------------------------------------

CLOSED = [  # name, low, high
    ("temperature", 0, 100),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("guidance_scale", 0, 20),
]
OPEN = [  # name, bound that is not reached, high, unit in the message
    ("top_p", 0, 1),
    ("repetition_penalty", 0, 10),
    ("timeout_s", 0, 86400),
]
INTEGERS = [  # name, low, high
    ("n", 1, 16),
    ("seed", 0, MAX_SEED),
    ("priority", -1_000_000, 1_000_000),
    ("logprobs", 0, 20),
    ("prompt_logprobs", 0, 20),
]
FROM_ZERO = ["max_tokens", "min_tokens", "top_k"]
IN_DISTRIBUTIONS = {"temperature", "top_k", "top_p", "min_p"}


def fields_of(name: str, value: Any, modality: str = "text") -> dict[str, Any]:
    """What sets `name`, wherever it lives."""
    if name in IN_DISTRIBUTIONS:
        return {modality: Distribution(**{name: value})}
    return {name: value}


@pytest.mark.parametrize(("name", "low", "high"), CLOSED)
def test_numbers_between_limits(name: str, low: float, high: float) -> None:
    for value in (low, high, float(low)):
        SamplingParams(**fields_of(name, value))
    for value in (low - 0.5, high + 0.5, math.nan, math.inf, -math.inf, 10**400):
        with pytest.raises(SamplingError) as caught:
            SamplingParams(**fields_of(name, value))
        assert str(caught.value).startswith(f"{name} must be between {low} and {high}, got ")
        assert caught.value.param == name


@pytest.mark.parametrize(("name", "low", "high"), OPEN)
def test_numbers_above_a_limit(name: str, low: float, high: float) -> None:
    for value in (5e-324, high):
        SamplingParams(**fields_of(name, value))
    for value in (low, -1, high + 0.5, math.nan, math.inf, -math.inf, 10**400):
        with pytest.raises(SamplingError) as caught:
            SamplingParams(**fields_of(name, value))
        message = f"{name} must be above {low} and at most {high}, got "
        assert str(caught.value).startswith(message)
        assert caught.value.param == name


@pytest.mark.parametrize(("name", "low", "high"), INTEGERS)
def test_integers_between_limits(name: str, low: int, high: int) -> None:
    for value in (low, high):
        SamplingParams(**fields_of(name, value))
    for value in (low - 1, high + 1):
        assert_refused(
            f"{name} must be between {low} and {high}, got {value}", name, **{name: value}
        )


@pytest.mark.parametrize("name", FROM_ZERO)
def test_integers_from_zero(name: str) -> None:
    SamplingParams(**fields_of(name, 0))
    SamplingParams(**fields_of(name, 2**70))
    assert_refused(f"{name} must be at least 0, got -1", name, **fields_of(name, -1))


@pytest.mark.parametrize("name", sorted(IN_DISTRIBUTIONS))
def test_picture_tokens_have_limits_of_their_own_name(name: str) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**fields_of(name, -1, "image"))
    assert caught.value.param == f"image_{name}"
    assert str(caught.value).startswith(f"image_{name} must be ")


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": None},
        {"seed": None},
        {"logprobs": None},
        {"prompt_logprobs": None},
        {"cache_salt": None},
        {"timeout_s": None},
        {"routing": None},
        {"prompt_routing": None},
    ],
)
def test_none_means_no_limit_or_the_default(fields: dict[str, Any]) -> None:
    assert SamplingParams(**fields) == SamplingParams()


# --- wrong types ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, *_ in (*CLOSED, *OPEN)])
@pytest.mark.parametrize("value", [True, "0.5", [0.5], 1j])
def test_numbers_are_not_converted(name: str, value: Any) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**fields_of(name, value))
    assert f"{name} must be a number " in str(caught.value)
    assert str(caught.value).endswith(f", got {value!r}")


@pytest.mark.parametrize("name", [*(name for name, *_ in INTEGERS), *FROM_ZERO])
@pytest.mark.parametrize("value", [True, "5", 2.0, math.nan, [5]])
def test_integers_are_not_converted(name: str, value: Any) -> None:
    with pytest.raises(SamplingError) as caught:
        SamplingParams(**fields_of(name, value))
    assert f"{name} must be an integer " in str(caught.value)
    assert str(caught.value).endswith(f", got {value!r}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": {"temperature": 1}}, "text must be a Distribution, got {'temperature': 1}"),
        ({"image": None}, "image must be a Distribution, got None"),
        ({"ignore_eos": 1}, "ignore_eos must be a bool, got 1"),
        ({"stop": 5}, "stop must be strings, got 5"),
        ({"stop": ("a", 5)}, "stop must be strings, got ('a', 5)"),
        ({"stop": (b"a",)}, "stop must be strings, got (b'a',)"),
        ({"stop_token_ids": 5}, "stop_token_ids must be token ids, got 5"),
        ({"stop_token_ids": "5"}, "stop_token_ids must be token ids, got '5'"),
        ({"stop_token_ids": (True,)}, "stop_token_ids must be token ids, got (True,)"),
        ({"stop_token_ids": (2.0,)}, "stop_token_ids must be token ids, got (2.0,)"),
        ({"logit_bias": [3]}, "logit_bias must map token ids to numbers, got [3]"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias must map token ids to numbers, got {'3': 1.0}"),
        ({"logit_bias": {3: "1"}}, "logit_bias must be a number between -100 and 100, got '1'"),
        ({"logit_bias": {3: True}}, "logit_bias must be a number between -100 and 100, got True"),
        ({"cache_salt": 5}, "cache_salt must be Unicode text, got 5"),
        ({"cache_salt": b"a"}, "cache_salt must be Unicode text, got b'a'"),
        ({"cache_salt": "\ud800"}, "cache_salt must be Unicode text, got '\\ud800'"),
    ],
)
def test_other_types(fields: dict[str, Any], message: str) -> None:
    assert_refused(message, next(iter(fields)), **fields)


def test_messages_stay_short() -> None:
    for value in ("x" * 10_000, [0] * 10_000, 10**4999):
        with pytest.raises(SamplingError) as caught:
            SamplingParams(n=value)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 150
    with pytest.raises(SamplingError, match="too many digits"):
        SamplingParams(guidance_scale=10**5000)


# --- lengths, and what belongs together ----------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_salt": ""}, "cache_salt must have 1 to 256 characters, got 0"),
        ({"cache_salt": "x" * 257}, "cache_salt must have 1 to 256 characters, got 257"),
        ({"stop": ["a"] * 9}, "stop must have at most 8 strings, got 9"),
        ({"stop": ["a", ""]}, "each stop string must have 1 to 256 characters, got 0"),
        ({"stop": "a" * 257}, "each stop string must have 1 to 256 characters, got 257"),
        ({"stop_token_ids": range(65)}, "stop_token_ids must have at most 64 ids, got 65"),
        (
            {"logit_bias": dict.fromkeys(range(301), 0.0)},
            "logit_bias must have at most 300 entries, got 301",
        ),
        ({"logit_bias": {3: -100.5}}, "logit_bias must be between -100 and 100, got -100.5"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens must be at most max_tokens 5, got 6"),
        ({"min_tokens": 1, "max_tokens": 0}, "min_tokens must be at most max_tokens 0, got 1"),
    ],
)
def test_limits(fields: dict[str, Any], message: str) -> None:
    assert_refused(message, next(iter(fields)), **fields)


def test_what_is_just_within_the_limits() -> None:
    SamplingParams(
        cache_salt="é" * 256,
        stop=("a" * 256,) * 8,
        stop_token_ids=tuple(range(64)),
        logit_bias={i: (-1) ** i * 100 for i in range(300)},
        min_tokens=5,
        max_tokens=5,
    )
    assert SamplingParams(min_tokens=9).max_tokens is None


def test_collections_are_copied() -> None:
    """What was checked is what the engine's thread reads later."""
    stop, ids, bias = ["a", "b"], [3, 4], {3: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)  # type: ignore[arg-type]
    stop.append("c")
    ids.append(5)
    bias[3] = 1000.0
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (3, 4))
    assert params.logit_bias == {3: 1.0}
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
