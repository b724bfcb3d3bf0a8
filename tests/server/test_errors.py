"""Every way to fail has a status, a code, and OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

from momaserve import errors as engine_errors
from momaserve.errors import (
    EngineDeadError,
    MomaserveError,
    PromptError,
    QueueFullError,
    RequestError,
    SamplingError,
)
from momaserve_server import errors as server_errors
from momaserve_server.errors import ERROR_TABLE, wire_error
from momaserve_server.schemas_common import GenerationFields
from tests.server.asgi import Call, chat_body, http, make_app
from tests.server.fake_engine import FakeAsyncEngine

pytestmark = pytest.mark.anyio


def error_of(body: Any) -> dict[str, Any]:
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def all_classes() -> set[type[MomaserveError]]:
    found = {
        value
        for module in (engine_errors, server_errors)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, MomaserveError)
    }
    # These stop a process, not a request; if one gets here it is a bug of ours: 500.
    names = {"ConfigError", "CheckpointError", "DataError", "WarmUpError"}
    return {cls for cls in found if cls.__name__ not in names}


async def test_every_error_class_has_a_line_in_the_table() -> None:
    assert all_classes() == {cls for cls, _ in ERROR_TABLE}


async def test_a_subclass_stands_before_its_base() -> None:
    classes = [cls for cls, _ in ERROR_TABLE]
    for at, cls in enumerate(classes):
        assert not any(issubclass(later, cls) for later in classes[at + 1 :]), cls


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (PromptError("x", param="prompt"), 400, "invalid_request_error", "invalid_prompt"),
        (SamplingError("x", param="n"), 400, "invalid_request_error", "invalid_value"),
        (RequestError("x"), 400, "invalid_request_error", "invalid_request"),
        (QueueFullError("x", retry_after_s=7), 429, "rate_limit_error", "queue_full"),
        (EngineDeadError("x"), 503, "server_error", "engine_dead"),
        (RuntimeError("secret"), 500, "server_error", "internal_error"),
    ],
)
async def test_what_the_engine_refuses(error: Exception, status: int, kind: str, code: str) -> None:
    fake = FakeAsyncEngine()
    fake.refusal = error
    async with http(fake) as client:
        for stream in (False, True):
            response = await client.post("/v1/chat/completions", json=chat_body(stream=stream))
            body = error_of(response.json())
            assert (response.status_code, body["type"], body["code"]) == (status, kind, code)
            assert "secret" not in response.text
            assert body["param"] == getattr(error, "param", None)
            assert response.headers.get("retry-after") == ("7" if status == 429 else None)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "route_not_found"),
        ("POST", "/v2/chat/completions", 404, "route_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/redoc", 404, "route_not_found"),
        ("GET", "/playground/../settings.py", 404, "route_not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
async def test_what_the_framework_refuses(method: str, path: str, status: int, code: str) -> None:
    async with http() as client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert error_of(response.json())["code"] == code


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b'{"a":}', b"\xff\xfe", b"[" * 5000, b'{"messages": "\\ud800"}'],
)
async def test_malformed_json(content: bytes) -> None:
    async with http() as client:
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/images/generations"):
            response = await client.post(path, content=content)
            assert response.status_code == 400
            assert error_of(response.json())["code"] == "invalid_json"


@pytest.mark.parametrize("content", [b"[]", b'"x"', b"5", b"null"])
async def test_json_that_is_no_object(content: bytes) -> None:
    async with http() as client:
        response = await client.post("/v1/chat/completions", content=content)
    assert response.status_code == 400
    assert error_of(response.json())["message"] == "the body must be a JSON object"


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("application/problem+json", 200),
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
    ],
)
async def test_content_type(content_type: str, status: int) -> None:
    async with http() as client:
        response = await client.post(
            "/v1/chat/completions",
            content=json.dumps(chat_body()),
            headers={"content-type": content_type},
        )
    assert response.status_code == status
    if status == 400:
        assert content_type in error_of(response.json())["message"]


async def test_missing_field_is_named() -> None:
    async with http() as client:
        response = await client.post("/v1/completions", json={"model": "fake"})
    error = error_of(response.json())
    assert (error["param"], error["code"]) == ("prompt", "missing_field")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat_body()),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/images/generations", {"prompt": "x"}),
    ],
)
async def test_unknown_model(path: str, body: dict[str, Any]) -> None:
    async with http() as client:
        response = await client.post(path, json=body | {"model": "gpt"})
        accepted = await client.post(path, json=body | {"model": "fake"})
    assert response.status_code == 404
    error = error_of(response.json())
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt'" in error["message"]
    assert accepted.status_code == 200


async def test_served_model_name_replaces_the_checkpoints() -> None:
    async with http(served_model_name="apple") as client:
        response = await client.post("/v1/chat/completions", json=chat_body(model="apple"))
        old = await client.post("/v1/chat/completions", json=chat_body(model="fake"))
    assert response.json()["model"] == "apple"
    assert old.status_code == 404


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "between 0 and 100, got -0.1"),
        ("top_p", 0.0, "above 0 and at most 1, got 0.0"),
        ("top_k", -2, "at least 0, got -2"),
        ("min_p", 2.0, "between 0 and 1, got 2.0"),
        ("n", 0, "between 1 and 16, got 0"),
        ("n", 17, "between 1 and 16, got 17"),
        ("seed", -1, "got -1"),
        ("seed", 2**63, str(2**63)),
        ("stop", ["x"] * 9, "at most 8 strings, got 9"),
        ("stop", "", "1 to 256 characters, got 0"),
        ("stop_token_ids", [1] * 65, "at most 64 ids, got 65"),
        ("logit_bias", {"5": 101}, "between -100 and 100, got 101"),
        ("image_temperature", -1, "image_temperature"),
        ("image_top_k", -1, "image_top_k"),
        ("image_top_p", 1.5, "image_top_p"),
        ("guidance_scale", 20.5, "between 0 and 20, got 20.5"),
        ("min_tokens", -1, "at least 0, got -1"),
        ("repetition_penalty", 0, "above 0 and at most 10, got 0"),
        ("presence_penalty", 2.1, "between -2 and 2, got 2.1"),
        ("frequency_penalty", -2.1, "between -2 and 2, got -2.1"),
        ("priority", 10**7, "between -1000000 and 1000000, got 10000000"),
        ("cache_salt", "", "1 to 256 characters, got 0"),
        ("timeout_s", 0, "above 0 and at most 86400, got 0"),
    ],
)
async def test_impossible_sampling_values_name_value_and_limit(
    field: str, value: Any, words: str
) -> None:
    bodies = {"/v1/chat/completions": chat_body(), "/v1/completions": {"prompt": "x"}}
    if field in GenerationFields.model_fields:
        bodies["/v1/images/generations"] = {"prompt": "x"}
    async with http() as client:
        for path, body in bodies.items():
            response = await client.post(path, json=body | {field: value})
            assert response.status_code == 400
            error = error_of(response.json())
            assert error["param"] == field
            assert words in error["message"]


async def test_min_tokens_above_max_tokens() -> None:
    body = chat_body(min_tokens=4, max_tokens=3)
    async with http() as client:
        response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    error = error_of(response.json())
    assert error["param"] == "min_tokens"
    assert error["message"] == "min_tokens must be at most max_tokens 3, got 4"


@pytest.mark.parametrize(("declared", "num_received"), [(180, 3), (201, 0)])
async def test_declared_length_over_the_limit_is_refused(declared: int, num_received: int) -> None:
    """Somewhat too long is read to its end, so that clients see the answer; far too long is not."""
    length = str(declared).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    call = Call(
        make_app(max_body_bytes=100),
        "/v1/chat/completions",
        pieces=[b"x" * 60] * 3,
        headers=headers,
    )
    assert await call.start() == 413
    error = error_of(json.loads(await call.rest()))
    assert error["code"] == "body_too_large"
    assert str(declared) in error["message"]
    assert "100" in error["message"]
    assert call.num_received == num_received


async def test_chunked_body_is_counted_while_it_is_read() -> None:
    call = Call(make_app(max_body_bytes=100), "/v1/chat/completions", pieces=[b"x" * 60] * 9)
    assert await call.start() == 413
    assert error_of(json.loads(await call.rest()))["code"] == "body_too_large"
    assert call.num_received == 4  # 240 bytes: more than twice the limit


async def test_values_that_change_nothing_are_taken() -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1}
    async with http() as client:
        chat = await client.post("/v1/chat/completions", json=chat_body(**neutral, top_k=-1))
        body = {"prompt": "hi", "best_of": 1, "suffix": None, **neutral}
        completion = await client.post("/v1/completions", json=body)
        refused = await client.post("/v1/completions", json={**body, "best_of": 2})
    assert (chat.status_code, completion.status_code) == (200, 200)
    assert refused.status_code == 400
    assert "ask for n choices instead, got 2" in error_of(refused.json())["message"]


async def test_body_of_exactly_the_limit_is_read() -> None:
    content = json.dumps(chat_body()).encode()
    async with http(max_body_bytes=len(content)) as client:
        response = await client.post("/v1/chat/completions", content=content)
    assert response.status_code == 200


async def test_too_large_closes_the_connection() -> None:
    async with http(max_body_bytes=10) as client:
        response = await client.post("/v1/chat/completions", json=chat_body())
    assert response.status_code == 413
    assert response.headers["connection"] == "close"


async def test_client_that_leaves_while_it_sends_is_forgotten() -> None:
    fake = FakeAsyncEngine()
    call = Call(make_app(fake), "/v1/chat/completions", pieces=[])
    call.hang_up()
    await call.ended()
    assert fake.submissions == []


async def test_every_answer_carries_a_request_id() -> None:
    async with http() as client:
        first = await client.get("/health")
        second = await client.get("/nothing")
    ids = {first.headers["x-request-id"], second.headers["x-request-id"]}
    assert len(ids) == 2


async def test_unexpected_errors_keep_their_text() -> None:
    told = wire_error(ValueError("password"))
    assert told.status == 500
    assert "password" not in told.message
