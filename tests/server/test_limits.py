"""Every limit of the operator: what is above it is refused with value and limit, and the next
request succeeds."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import httpx
import pytest

from momaserve.errors import QueueFullError, SamplingError
from momaserve.sampling import MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS, SamplingParams
from momaserve_server.limits import longest_answer
from momaserve_server.settings import ServerSettings
from tests.server.asgi import chat_body, http
from tests.server.fake_engine import FakeAsyncEngine
from tests.server.test_media import ask, data_url, png

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
PROMPT = {"prompt": "hi"}


async def refusal(
    path: str, body: dict[str, Any], good: dict[str, Any], **settings: Any
) -> httpx.Response:
    """What `body` gets; nothing of it may reach the engine, and `good` must be answered after."""
    fake = FakeAsyncEngine()
    async with http(fake, **settings) as client:
        response = await client.post(path, json=body)
        assert fake.submissions == []
        assert (await client.post(path, json=good)).status_code == 200
    assert len(fake.submissions) == 1
    return response


@pytest.mark.parametrize(
    ("setting", "limit", "path", "field", "value"),
    [
        ("max_n", 2, CHAT, "n", 3),
        ("max_n", 2, COMPLETIONS, "n", 16),
        ("max_n", 1, IMAGES, "n", 2),
        ("max_output_tokens", 5, CHAT, "max_tokens", 6),
        ("max_output_tokens", 5, CHAT, "max_completion_tokens", 10**9),
        ("max_output_tokens", 5, COMPLETIONS, "max_tokens", 6),
        ("max_logprobs", 1, COMPLETIONS, "logprobs", 2),
        ("max_logprobs", 0, COMPLETIONS, "logprobs", 20),
    ],
)
async def test_numbers_above_the_operators_limit(
    setting: str, limit: int, path: str, field: str, value: int
) -> None:
    good: dict[str, Any] = chat_body() if path == CHAT else PROMPT
    response = await refusal(path, good | {field: value}, good | {field: limit}, **{setting: limit})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", field)
    assert error["message"] == f"{field} must be at most {limit}, got {value}"


async def test_top_logprobs_of_a_chat() -> None:
    good = chat_body(logprobs=True, top_logprobs=2)
    response = await refusal(CHAT, good | {"top_logprobs": 3}, good, max_logprobs=2)
    error = response.json()["error"]
    assert error["param"] == "top_logprobs"
    assert error["message"] == "top_logprobs must be at most 2, got 3"


async def test_stop_strings() -> None:
    for path, body in ((CHAT, chat_body()), (COMPLETIONS, PROMPT)):
        response = await refusal(
            path, body | {"stop": ["a", "b", "c"]}, body | {"stop": ["a", "b"]}, max_stop=2
        )
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "stop")
        assert error["message"] == "stop may have at most 2 strings, got 3"
    async with http(max_stop=1) as client:  # one string is one, however long
        body = chat_body(stop="a long one")
        assert (await client.post(CHAT, json=body)).status_code == 200


async def test_the_engines_own_limits_stay() -> None:
    for field, value, words in (("n", 17, "1 and 16, got 17"), ("stop", ["x"] * 9, "got 9")):
        response = await refusal(CHAT, chat_body(**{field: value}), chat_body())
        assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, chat_body(), 5),
        (CHAT, chat_body(max_tokens=3), 3),
        (CHAT, chat_body(modalities=["image"]), 5),
        (COMPLETIONS, PROMPT, 5),
        (COMPLETIONS, PROMPT | {"max_tokens": 0, "echo": True}, 0),
        (IMAGES, PROMPT, None),
    ],
)
async def test_an_answer_is_cut_where_nothing_was_said(
    path: str, body: dict[str, Any], expected: int | None
) -> None:
    fake = FakeAsyncEngine()
    async with http(fake, max_output_tokens=5) as client:
        assert (await client.post(path, json=body)).status_code == 200
    assert fake.submissions[0].params.max_tokens == expected


async def test_min_tokens_above_what_an_answer_may_have() -> None:
    response = await refusal(
        CHAT, chat_body(min_tokens=6), chat_body(min_tokens=5), max_output_tokens=5
    )
    message = response.json()["error"]["message"]
    assert message == "min_tokens must be at most max_tokens 5, got 6"


def test_the_longest_answer() -> None:
    assert longest_answer(None, ServerSettings()) is None
    assert longest_answer(7, ServerSettings()) == 7
    assert longest_answer(None, ServerSettings(max_output_tokens=5)) == 5
    assert longest_answer(7, ServerSettings(max_output_tokens=5)) == 5
    assert longest_answer(0, ServerSettings(max_output_tokens=5)) == 0


async def test_the_model_card_shows_the_limits() -> None:
    settings: dict[str, Any] = {
        "max_n": 3,
        "max_output_tokens": 40,
        "max_logprobs": 2,
        "max_stop": 1,
    }
    async with http(**settings) as client:
        limits = (await client.get("/v1/models")).json()["data"][0]["limits"]
    assert {name: limits[name.removeprefix("max_")] for name in settings} == settings


# --- sizes ---------------------------------------------------------------------------------


async def test_a_body_that_is_really_too_long() -> None:
    limit = 1 << 20
    body = chat_body() | {"user": "x" * limit}
    response = await refusal(CHAT, body, chat_body(), max_body_bytes=limit)
    assert response.status_code == 413
    assert str(limit) in response.json()["error"]["message"]


async def test_a_picture_file_that_is_really_too_long() -> None:
    limit = 100_000
    huge = data_url(png() + b"x" * limit)
    response = await refusal(CHAT, ask(huge), ask(data_url(png())), max_image_bytes=limit)
    assert response.status_code == 400
    assert f"at most {limit} bytes, got {limit + len(png())}" in response.json()["error"]["message"]


def bomb(side: int) -> bytes:
    """A PNG of `side` x `side` black pixels, one bit each: a file of some kilobytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        checked = kind + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


async def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    side = 32_000
    url = data_url(bomb(side))
    assert len(url) < 1_000_000
    response = await refusal(CHAT, ask(url), ask(data_url(png())))
    assert response.status_code == 400
    limit = ServerSettings().max_image_pixels
    words = f"at most {limit} pixels, got {side} x {side}"
    assert words in response.json()["error"]["message"]


async def test_too_many_pictures_and_prompts() -> None:
    one = data_url(png())
    response = await refusal(CHAT, ask(*[one] * 100), ask(one), max_images_per_request=2)
    assert "100 pictures; the limit is 2" in response.json()["error"]["message"]
    body = {"prompt": ["a"] * 1000}
    response = await refusal(COMPLETIONS, body, PROMPT, max_prompts_per_request=3)
    assert "1000 prompts; the limit is 3" in response.json()["error"]["message"]


# --- the queue -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_says_when_to_come_again(stream: bool) -> None:
    fake = FakeAsyncEngine()
    fake.refusal = QueueFullError("256 requests wait; the limit is 256", retry_after_s=3)
    async with http(fake) as client:
        response = await client.post(CHAT, json=chat_body(stream=stream))
        assert response.status_code == 429
        assert response.headers["retry-after"] == "3"
        assert response.json()["error"]["code"] == "queue_full"
        fake.refusal = None
        assert (await client.post(CHAT, json=chat_body())).status_code == 200


def test_defaults_are_the_engines_own() -> None:
    settings = ServerSettings()
    assert (settings.max_n, settings.max_logprobs, settings.max_stop) == (
        MAX_N,
        MAX_LOGPROBS,
        MAX_STOP_STRINGS,
    )
    with pytest.raises(SamplingError):
        SamplingParams(n=MAX_N + 1)
    with pytest.raises(SamplingError):
        SamplingParams(logprobs=MAX_LOGPROBS + 1)
