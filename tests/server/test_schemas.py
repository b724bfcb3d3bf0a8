"""What request bodies may hold: strict types, named refusals, the documented allow-list."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from momaserve_server.body import body_error
from momaserve_server.errors import InvalidBodyError
from momaserve_server.schemas_chat import ChatRequest
from momaserve_server.schemas_common import IGNORED_FIELDS, UNSUPPORTED_FIELDS
from momaserve_server.schemas_completions import CompletionRequest
from momaserve_server.schemas_images import ImageRequest

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"prompt": "hi"}
IMAGE = {"prompt": "apple"}
Schema = type[ChatRequest] | type[CompletionRequest] | type[ImageRequest]
ROUTES: list[tuple[Schema, dict[str, Any]]] = [
    (ChatRequest, CHAT),
    (CompletionRequest, COMPLETION),
    (ImageRequest, IMAGE),
]


def refusal(schema: Schema, body: Any) -> InvalidBodyError:
    with pytest.raises(ValidationError) as caught:
        schema.model_validate_json(json.dumps(body))
    return body_error(caught.value)


def parse(schema: Schema, body: Any) -> Any:
    return schema.model_validate_json(json.dumps(body))


@pytest.mark.parametrize(("schema", "body"), ROUTES)
def test_minimal_body_is_enough(schema: Schema, body: dict[str, Any]) -> None:
    assert parse(schema, body).n is None


@pytest.mark.parametrize(("schema", "body"), ROUTES)
def test_unknown_field_is_refused_by_name(schema: Schema, body: dict[str, Any]) -> None:
    error = refusal(schema, body | {"colour": "red"})
    assert (str(error), error.param, error.code) == (
        "unknown field 'colour'",
        "colour",
        "unknown_field",
    )


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_FIELDS))
def test_unsupported_field_is_refused_with_its_reason(name: str) -> None:
    error = refusal(ChatRequest, CHAT | {name: None})
    assert str(error) == f"{name!r}: {UNSUPPORTED_FIELDS[name]}"
    assert error.param == name


@pytest.mark.parametrize(("schema", "body"), ROUTES)
@pytest.mark.parametrize("value", [None, "x", {"a": 1}, True])
def test_ignored_fields_take_anything(schema: Schema, body: dict[str, Any], value: Any) -> None:
    parse(schema, body | dict.fromkeys(IGNORED_FIELDS, value))


def test_the_allow_list_is_the_documented_one() -> None:
    assert {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
    } == IGNORED_FIELDS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_k", 1.5),
        ("seed", "7"),
        ("n", 1.0),
        ("stream", "true"),
        ("stream", 1),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stop_token_ids", [True]),
        ("guidance_scale", "3"),
        ("min_tokens", 1.0),
        ("repetition_penalty", True),
        ("presence_penalty", "0"),
        ("frequency_penalty", [0]),
        ("priority", 0.5),
        ("cache_salt", 5),
        ("timeout_s", "1"),
        ("logit_bias", {"one": 1}),
        ("logit_bias", [1]),
        ("modalities", ["audio"]),
        ("modalities", "text"),
        ("modalities", []),
        ("routing", "expert_choice"),
        ("routing", "threshold"),
        ("prompt_routing", "threshold"),
        ("partial_images", -1),
        ("partial_images", 65),
        ("top_logprobs", -1),
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
        ("stream_options", {"include": True}),
        ("messages", []),
        ("messages", "hi"),
        ("model", 5),
    ],
)
def test_values_are_not_converted(field: str, value: Any) -> None:
    error = refusal(ChatRequest, CHAT | {field: value})
    assert field in f"{error} {error.param}"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_are_finite(number: str) -> None:
    body = json.dumps(CHAT)[:-1] + f', "temperature": {number}}}'
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate_json(body)
    assert body_error(caught.value).param == "temperature"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 3, "max_completion_tokens": 4}, "disagree"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "20"),
        ({"stream_options": {"include_usage": True}}, "needs stream"),
    ],
)
def test_contradictions_are_named(fields: dict[str, Any], words: str) -> None:
    assert words in str(refusal(ChatRequest, CHAT | fields))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (5, "valid string"),
        ([], None),
        ([{"type": "text"}], "needs the field 'text'"),
        ([{"type": "image_url", "text": "x"}], "needs the field 'image_url'"),
        ([{"type": "text", "text": "x", "image_url": {"url": "data:"}}], "cannot have"),
        ([{"type": "input_audio"}], "'text' or 'image_url'"),
        ([{"type": "text", "text": "x", "extra": 1}], "unknown field"),
        ([{"type": "image_url", "image_url": "data:"}], "image_url"),
        ([{"type": "image_url", "image_url": {"url": "data:", "detail": "low"}}], None),
    ],
)
def test_message_content(content: Any, words: str | None) -> None:
    body = {"messages": [{"role": "user", "content": content}]}
    if words is None:
        parse(ChatRequest, body)
    else:
        error = refusal(ChatRequest, body)
        assert words in str(error)
        assert error.param is not None
        assert error.param.startswith("messages.0.content")


@pytest.mark.parametrize("role", ["tool", "function", "robot"])
def test_unknown_roles_are_refused(role: str) -> None:
    error = refusal(ChatRequest, {"messages": [{"role": role, "content": "x"}]})
    assert error.param == "messages.0.role"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", ["ab"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([], [[]]),
    ],
)
def test_prompts_one_by_one(prompt: Any, prompts: Any) -> None:
    assert parse(CompletionRequest, {"prompt": prompt}).prompts() == prompts


@pytest.mark.parametrize("prompt", [5, None, ["a", 1], [1, True], [[1], "a"], [1.5], [["a"]]])
def test_impossible_prompts_get_one_clear_message(prompt: Any) -> None:
    error = refusal(CompletionRequest, {"prompt": prompt})
    assert str(error).startswith("prompt: must be a string, a list of token ids")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": "url"},
        {"output_format": "jpeg"},
        {"background": "transparent"},
        {"partial_images": 4, "stream": True},
        {"partial_images": 1},
        {"prompt": ""},
        {"temperature": 1.0},
    ],
)
def test_image_requests_that_cannot_be_met(fields: dict[str, Any]) -> None:
    refusal(ImageRequest, IMAGE | fields)


def test_long_values_are_cut_in_messages() -> None:
    assert len(str(refusal(ChatRequest, CHAT | {"temperature": "x" * 10_000}))) < 200
