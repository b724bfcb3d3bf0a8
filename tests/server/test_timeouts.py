"""`timeout_s`: what there is by then is the answer; where there is nothing, it is a 408."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from momaserve.outputs import FinishReason
from momaserve_server.metrics import ServerMetrics
from tests.server.asgi import chat_body, client_of, data_of, http, make_app
from tests.server.fake_engine import TEXT, FakeAsyncEngine, byte_ids

pytestmark = pytest.mark.anyio
CHAT, COMPLETIONS, IMAGES = "/v1/chat/completions", "/v1/completions", "/v1/images/generations"
PROMPT = {"prompt": "ab", "timeout_s": 1.5}


def cut_after(num_tokens: int, choices: Sequence[int] | None = None) -> FakeAsyncEngine:
    """An engine whose time is up after so many tokens of each of `choices`."""
    fake = FakeAsyncEngine()
    fake.failure = (num_tokens, FinishReason.TIMEOUT)
    fake.failing_choices = None if choices is None else set(choices)
    return fake


async def post(fake: FakeAsyncEngine, path: str, body: dict[str, Any]) -> httpx.Response:
    async with http(fake) as client:
        return await client.post(path, json=body)


def assert_is_timeout(response: httpx.Response, message: str) -> None:
    assert response.status_code == 408, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (
        "timeout_error",
        "timeout",
        "timeout_s",
    )
    assert error["message"] == message
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat_body(timeout_s=1.5)),
        (CHAT, chat_body(timeout_s=1.5, n=3, modalities=["image"])),
        (COMPLETIONS, PROMPT),
        (COMPLETIONS, PROMPT | {"prompt": ["a", "b"], "n": 2}),
        (COMPLETIONS, PROMPT | {"echo": True, "logprobs": 1}),
    ],
)
async def test_nothing_before_the_deadline_is_a_408(path: str, body: dict[str, Any]) -> None:
    fake = cut_after(0)
    assert_is_timeout(await post(fake, path, body), "timeout_s 1.5 passed before the first token")
    assert fake.running == set()


async def test_a_text_that_is_cut_off_is_the_answer_so_far() -> None:
    body = chat_body(seed=5, timeout_s=1, logprobs=True, return_token_ids=True)
    reply = (await post(cut_after(2), CHAT, body)).json()
    choice = reply["choices"][0]
    assert choice["message"]["content"] == TEXT[:2]
    assert choice["finish_reason"] == "timeout"
    assert choice["token_ids"] == byte_ids(TEXT[:2])
    assert len(choice["logprobs"]["content"]) == 2
    assert reply["usage"]["completion_tokens"] == 2
    completion = (await post(cut_after(2), COMPLETIONS, PROMPT)).json()["choices"][0]
    assert (completion["text"], completion["finish_reason"]) == (TEXT[:2], "timeout")


async def test_text_that_was_held_back_comes_out() -> None:
    body = chat_body(seed=5, timeout_s=1, stop="Grand")
    choice = (await post(cut_after(2), CHAT, body)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Gr", "timeout")


async def test_choices_end_each_for_its_own_reason() -> None:
    body = chat_body(seed=5, n=2, timeout_s=1)
    first, second = (await post(cut_after(0, [0]), CHAT, body)).json()["choices"]
    assert (first["message"]["content"], first["finish_reason"]) == ("", "timeout")
    assert (second["message"]["content"], second["finish_reason"]) == (f"{TEXT}6", "stop")


async def test_a_prompt_that_was_not_scored_has_no_logprobs() -> None:
    body = PROMPT | {"n": 2, "echo": True, "logprobs": 1, "max_tokens": 0}
    first, second = (await post(cut_after(0, [0]), COMPLETIONS, body)).json()["choices"]
    assert (first["text"], first["logprobs"], first["finish_reason"]) == ("ab", None, "timeout")
    assert len(second["logprobs"]["token_logprobs"]) == 4  # bos a b sep
    assert second["finish_reason"] == "length"


@pytest.mark.parametrize("num_tokens", [0, 2])
@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, chat_body(seed=5)), (COMPLETIONS, PROMPT | {"seed": 5})]
)
async def test_a_stream_ends_with_the_reason(
    path: str, body: dict[str, Any], num_tokens: int
) -> None:
    options = {"timeout_s": 1, "stream": True, "stream_options": {"include_usage": True}}
    response = await post(cut_after(num_tokens), path, body | options)
    assert response.status_code == 200
    *chunks, last, usage, done = data_of(response.text)
    assert done == "[DONE]"
    assert last["choices"][0]["finish_reason"] == "timeout"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * len(chunks)
    assert usage["usage"]["completion_tokens"] == num_tokens
    assert "event: error" not in response.text


# --- pictures ------------------------------------------------------------------------------


async def test_a_chat_picture_that_is_cut_off_is_not_shown_as_whole() -> None:
    body = chat_body(modalities=["text", "image"], seed=5, timeout_s=1)
    num_text = len(byte_ids(f"{TEXT}5"))
    reply = (await post(cut_after(num_text + 3), CHAT, body)).json()  # begin_image and two codes
    choice = reply["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (f"{TEXT}5", "timeout")
    assert reply["usage"]["completion_tokens_details"] == {"image_tokens": 2}
    response = await post(cut_after(num_text + 3), CHAT, body | {"stream": True})
    *chunks, last, _done = data_of(response.text)
    images = [c["choices"][0]["delta"].get("image") for c in chunks]
    assert [image["tokens_done"] for image in images if image] == [1, 2]
    assert last["choices"][0]["finish_reason"] == "timeout"


@pytest.mark.parametrize("num_tokens", [0, 3])
async def test_an_image_request_is_answered_whole_or_not_at_all(num_tokens: int) -> None:
    message = "timeout_s passed when 0 of 1 pictures were whole"
    assert_is_timeout(await post(cut_after(num_tokens), IMAGES, PROMPT), message)
    message = "timeout_s passed when 1 of 2 pictures were whole"
    response = await post(cut_after(num_tokens, [1]), IMAGES, PROMPT | {"n": 2})
    assert_is_timeout(response, message)


async def test_an_image_stream_ends_with_an_error_after_what_is_whole() -> None:
    body = PROMPT | {"n": 2, "stream": True, "partial_images": 3}
    response = await post(cut_after(3, [1]), IMAGES, body)
    assert response.status_code == 200
    *events, error, done = data_of(response.text)
    kinds = [(event["type"].rpartition(".")[2], event["index"]) for event in events]
    assert kinds.count(("completed", 0)) == 1
    assert ("completed", 1) not in kinds
    assert kinds.count(("partial_image", 1)) == 2
    assert error["error"]["code"] == "timeout"
    assert done == "[DONE]"


async def test_a_picture_that_was_whole_in_time_is_delivered() -> None:
    """Time may be up between its last code and the next step."""
    response = await post(cut_after(6), IMAGES, PROMPT)
    assert response.status_code == 200
    assert response.json()["data"][0]["b64_json"]


async def test_a_timeout_is_not_an_abort() -> None:
    metrics, fake = ServerMetrics(), cut_after(0)
    async with client_of(make_app(fake, metrics=metrics)) as client:
        await client.post(CHAT, json=chat_body(timeout_s=1))
        await client.post(IMAGES, json=PROMPT)
    assert fake.abort_reasons == [FinishReason.ABORT] * 2  # what close does after any reply
    assert fake.aborted == []
    shown = metrics.render(fake.as_engine()).decode()
    assert set(re.findall(r"requests_aborted_total{.*} (.*)", shown)) == {"0.0"}
