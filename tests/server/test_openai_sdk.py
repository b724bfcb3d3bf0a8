"""The official OpenAI SDK, unmodified, against the app on a real socket."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Generator

import openai
import pytest
from openai import OpenAI

from momaserve.errors import QueueFullError
from momaserve.outputs import FinishReason
from tests.server.asgi import TIMEOUT_S
from tests.server.fake_engine import TEXT, FakeAsyncEngine, byte_ids
from tests.server.live import Live, live
from tests.server.test_media import data_url, png

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def running() -> Generator[Live, None, None]:
    with live() as started:
        yield started


@pytest.fixture
def client(running: Live) -> Generator[OpenAI, None, None]:
    with OpenAI(base_url=running.url + "/v1", api_key="unused", max_retries=0) as made:
        yield made


def test_chat(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hi"}], seed=5, user="me", store=False
    )
    assert reply.choices[0].message.content == f"{TEXT}5"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(byte_ids(f"{TEXT}5"))
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_with_logprobs(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=3,
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["G", "r", "bytes:\\xc3"]
    assert logprobs.content[0].top_logprobs[0].logprob == -0.5


def test_chat_stream_with_pictures(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"modalities": ["text", "image"], "seed": 5},
    )
    text, images, usage = "", [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            image = getattr(choice.delta, "image", None)
            if image:
                images.append(image)
    assert text == f"{TEXT}5!"
    assert [image["tokens_done"] for image in images] == [1, 2, 3, 4]
    assert base64.b64decode(images[-1]["b64_json"]).startswith(PNG)
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_chat_with_a_picture_and_its_own_answer(client: OpenAI) -> None:
    first = client.chat.completions.create(
        model="fake",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(png())}},
                    {"type": "text", "text": "what?"},
                ],
            }
        ],
    )
    again = client.chat.completions.create(
        model="fake",
        messages=[
            {"role": "user", "content": "a"},
            first.choices[0].message,  # type: ignore[list-item]
            {"role": "user", "content": "b"},
        ],
    )
    assert again.choices[0].message.content


def test_completion_and_scoring(client: OpenAI) -> None:
    ids = byte_ids("hello")
    reply = client.completions.create(model="fake", prompt=ids, echo=True, logprobs=1, max_tokens=0)
    choice = reply.choices[0]
    assert choice.text == "hello"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == len(ids)
    assert choice.logprobs.token_logprobs[0] is None


def test_completion_stream(client: OpenAI) -> None:
    stream = client.completions.create(model="fake", prompt="a", stream=True, seed=4, n=2)
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [f"{TEXT}4", f"{TEXT}5"]


def test_images(client: OpenAI) -> None:
    reply = client.images.generate(
        model="fake", prompt="apple", n=2, response_format="b64_json", extra_body={"seed": 3}
    )
    assert reply.data is not None
    assert len(reply.data) == 2
    assert base64.b64decode(reply.data[0].b64_json or "").startswith(PNG)
    assert reply.usage is not None
    assert reply.usage.output_tokens == 8


def test_images_stream(client: OpenAI) -> None:
    stream = client.images.generate(
        model="fake", prompt="apple", stream=True, partial_images=2, extra_body={"seed": 3}
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert base64.b64decode(events[-1].b64_json).startswith(PNG)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "momaserve"


def test_errors_arrive_as_the_sdks_own(client: OpenAI, running: Live) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("gpt")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hi"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert bad.value.param == "tools"
    running.fake.refusal = QueueFullError("full", retry_after_s=1)
    try:
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model="fake", prompt="x")
    finally:
        running.fake.refusal = None
    assert full.value.code == "queue_full"


def test_a_passed_deadline_is_not_tried_again() -> None:
    """The SDK retries a 408 by itself: the same work, for the same end."""
    fake = FakeAsyncEngine()
    fake.failure = (0, FinishReason.TIMEOUT)
    with live(fake) as started, OpenAI(base_url=started.url + "/v1", api_key="x") as client:
        assert client.max_retries > 0
        with pytest.raises(openai.APIStatusError) as late:
            client.chat.completions.create(
                model="fake",
                messages=[{"role": "user", "content": "hi"}],
                extra_body={"timeout_s": 0.5},
            )
    assert (late.value.status_code, late.value.code, late.value.param) == (
        408,
        "timeout",
        "timeout_s",
    )
    assert len(fake.submissions) == 1


def test_error_in_a_stream_is_raised() -> None:
    fake = FakeAsyncEngine()
    fake.failure = (2, FinishReason.ERROR)
    with live(fake) as started, OpenAI(base_url=started.url + "/v1", api_key="x") as client:
        stream = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        with pytest.raises(openai.APIError, match="out of luck"):
            list(stream)


def test_closing_a_stream_aborts_it() -> None:
    fake = FakeAsyncEngine()
    fake.gate = asyncio.Semaphore(1)
    with live(fake) as started, OpenAI(base_url=started.url + "/v1", api_key="x") as client:
        stream = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        ended = threading.Event()

        async def wait_for_the_end() -> None:
            await fake.stopped.wait()
            ended.set()

        asyncio.run_coroutine_threadsafe(wait_for_the_end(), started.loop)
        stream.close()
        assert ended.wait(TIMEOUT_S)
    assert not fake.running
    assert fake.aborted


def test_the_clients_own_timeout_is_its_typed_exception_and_frees_the_request() -> None:
    fake = FakeAsyncEngine()
    fake.gate = asyncio.Semaphore(0)
    with (
        live(fake) as started,
        OpenAI(base_url=started.url + "/v1", api_key="x", timeout=0.2, max_retries=0) as client,
    ):
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="fake", prompt="hi")
        ended = threading.Event()

        async def wait_for_the_end() -> None:
            while fake.running:
                fake.stopped.clear()
                await fake.stopped.wait()
            ended.set()

        asyncio.run_coroutine_threadsafe(wait_for_the_end(), started.loop)
        assert ended.wait(TIMEOUT_S)


def test_a_wrong_key_is_the_sdks_authentication_error() -> None:
    with live(api_keys=("right",)) as started:
        with (
            OpenAI(base_url=started.url + "/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as refused,
        ):
            client.models.list()
        assert refused.value.code == "invalid_api_key"
        with OpenAI(base_url=started.url + "/v1", api_key="right") as client:
            assert [model.id for model in client.models.list()] == ["fake"]


def test_a_full_queue_is_the_sdks_rate_limit_error() -> None:
    fake = FakeAsyncEngine()
    fake.refusal = QueueFullError("the queue is full", retry_after_s=3)
    with (
        live(fake) as started,
        OpenAI(base_url=started.url + "/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as refused,
    ):
        client.completions.create(model="fake", prompt="hi")
    assert refused.value.response.headers["retry-after"] == "3"
