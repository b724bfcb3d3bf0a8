"""Both clients against the real app: same methods, same results, errors as classes."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator
from typing import Any

import httpx
import pytest
from PIL import Image

from momaserve.errors import EngineDeadError, MomaserveError, PromptError, QueueFullError
from momaserve.outputs import FinishReason
from momaserve_client import (
    ApiError,
    AsyncClient,
    BadReplyError,
    BadRequestError,
    Client,
    CompletionChunk,
    ConnectionFailedError,
    DeadlineError,
    FinishChunk,
    ImageChunk,
    NotFoundError,
    ServerError,
    TextChunk,
    TooLargeError,
    UnavailableError,
    UsageChunk,
    picture,
)
from momaserve_client import (
    QueueFullError as ClientQueueFullError,
)
from momaserve_client.requests import ImageOptions, Options
from momaserve_server.schemas_common import GenerationFields, IgnoredFields, SamplingFields
from tests.server.asgi import make_app
from tests.server.fake_engine import TEXT, FakeAsyncEngine, byte_ids
from tests.server.live import Live, live


@pytest.fixture(scope="module")
def running() -> Generator[Live, None, None]:
    with live() as started:
        yield started


@pytest.fixture
def client(running: Live) -> Generator[Client, None, None]:
    with Client(running.url) as made:
        yield made


def red() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format="PNG")
    return buffer.getvalue()


def test_chat(client: Client) -> None:
    reply = client.chat("hi", seed=5, n=2, return_token_ids=True)
    assert reply.text == f"{TEXT}5"
    assert [choice.text for choice in reply.choices] == [f"{TEXT}5", f"{TEXT}6"]
    assert reply.choices[0].token_ids == tuple(byte_ids(f"{TEXT}5"))
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_chat_with_pictures_both_ways(client: Client) -> None:
    reply = client.chat([picture(red()), "what?"], modalities=["text", "image"], seed=1)
    assert [type(part) for part in reply.choices[0].parts] == [str, bytes, str]
    assert Image.open(io.BytesIO(reply.images[0])).size == (8, 8)
    assert reply.usage.image_tokens == 4


def test_stream_equals_whole(client: Client) -> None:
    whole = client.chat("hi", modalities=["text", "image"], seed=2)
    events = list(client.stream_chat("hi", modalities=["text", "image"], seed=2))
    text = "".join(event.text for event in events if isinstance(event, TextChunk))
    images = [event for event in events if isinstance(event, ImageChunk)]
    assert text == whole.text
    assert [image.tokens_done for image in images] == [1, 2, 3, 4]
    assert [image.png for image in images if image.is_whole] == list(whole.images)
    assert FinishChunk(reason="stop") in events
    assert events[-1] == UsageChunk(usage=whole.usage)


def test_partial_images(client: Client) -> None:
    events = client.stream_chat("hi", modalities=["image"], partial_images=0)
    assert [e.is_whole for e in events if isinstance(e, ImageChunk)] == [True]


def test_completions(client: Client) -> None:
    reply = client.complete("ab", seed=1)
    assert reply.text == f"{TEXT}1"
    scored = client.complete(byte_ids("abc"), echo=True, logprobs=1, max_tokens=0).choices[0]
    assert scored.text == "abc"
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs[0] is None
    assert scored.logprobs.text_offset == (0, 1, 2)
    events = list(client.stream_complete("ab", seed=1, logprobs=0))
    assert "".join(e.text for e in events if isinstance(e, CompletionChunk)) == f"{TEXT}1"


def test_images(client: Client) -> None:
    reply = client.generate_images("apple", n=2, seed=3)
    assert len(reply.images) == 2
    assert reply.usage.completion_tokens == 8
    events = list(client.stream_images("apple", n=2, seed=3, partial_images=1))
    assert [event.png for event in events if event.is_whole] == list(reply.images)
    assert sum(not event.is_whole for event in events) == 2


def test_models_and_health(client: Client) -> None:
    (model,) = client.models()
    assert (model.id, model.modalities) == ("fake", ("text", "image"))
    assert model.raw["limits"]["n"] == 16
    health = client.health()
    assert (health.is_healthy, health.is_ready) == (True, True)


def test_closing_a_stream_aborts(running: Live, client: Client) -> None:
    stream = client.stream_chat("hi", modalities=["image"], n=16)
    next(stream)
    stream.close()
    assert client.health().is_healthy


@pytest.mark.parametrize(
    ("refusal", "cls", "code"),
    [
        (PromptError("no", param="prompt"), BadRequestError, "invalid_prompt"),
        (QueueFullError("full", retry_after_s=7), ClientQueueFullError, "queue_full"),
        (EngineDeadError("dead"), UnavailableError, "engine_dead"),
        (MomaserveError("odd"), ServerError, "internal_error"),
    ],
)
def test_errors_mirror_the_servers(
    running: Live, client: Client, refusal: MomaserveError, cls: type[ApiError], code: str
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: client.chat("hi"),
        lambda: list(client.stream_chat("hi")),
        lambda: list(client.stream_images("hi")),
    ]
    running.fake.refusal = refusal
    try:
        for call in calls:
            with pytest.raises(cls) as caught:
                call()
            assert caught.value.code == code
            assert str(caught.value) == str(refusal)
    finally:
        running.fake.refusal = None
    if cls is ClientQueueFullError:
        assert caught.value.retry_after_s == 7
    if cls is BadRequestError:
        assert caught.value.param == "prompt"


def test_other_statuses(running: Live, client: Client) -> None:
    with pytest.raises(NotFoundError):
        client.chat("hi", model="gpt")
    with (
        live(max_body_bytes=10) as small,
        Client(small.url) as other,
        pytest.raises(TooLargeError),
    ):
        other.chat("hi")


def test_health_of_a_draining_server() -> None:
    fake = FakeAsyncEngine()
    fake.is_draining = True
    with live(fake) as started, Client(started.url) as client:
        health = client.health()
    assert (health.is_healthy, health.is_ready) == (True, False)


def test_error_inside_a_stream() -> None:
    fake = FakeAsyncEngine()
    fake.failure = (2, FinishReason.ABORT)
    with live(fake) as started, Client(started.url) as client:
        stream = client.stream_chat("hi")
        assert isinstance(next(stream), TextChunk)
        with pytest.raises(UnavailableError) as caught:
            list(stream)
    assert caught.value.code == "request_aborted"
    assert caught.value.status is None


def test_deadlines() -> None:
    fake = FakeAsyncEngine()
    fake.failure = (2, FinishReason.TIMEOUT)
    with live(fake) as started, Client(started.url) as client:
        reply = client.chat("hi", timeout_s=1)
        assert (reply.text, reply.choices[0].finish_reason) == (TEXT[:2], "timeout")
        assert FinishChunk(reason="timeout") in list(client.stream_chat("hi", timeout_s=1))
        with pytest.raises(DeadlineError) as caught:
            client.generate_images("hi", timeout_s=1)
        assert (caught.value.status, caught.value.code) == (408, "timeout")
        with pytest.raises(DeadlineError):
            list(client.stream_images("hi", timeout_s=1))


def test_cached_tokens() -> None:
    fake = FakeAsyncEngine()
    fake.num_cached_tokens = 3
    with live(fake) as started, Client(started.url) as client:
        assert client.chat("hi").usage.cached_tokens == 3
        assert client.complete("hi").usage.cached_tokens == 3
        assert client.generate_images("hi").usage.cached_tokens == 3


def test_every_option_is_a_field_of_the_server() -> None:
    """And the other way round, but for those that the methods name or the client sets."""
    own = {"stream", "stream_options"}
    text = {*SamplingFields.model_fields} - {*IgnoredFields.model_fields} - own
    images = {*GenerationFields.model_fields} - {*IgnoredFields.model_fields} - own
    assert {*Options.__annotations__} == text
    assert {*ImageOptions.__annotations__} == images


def test_nobody_listens() -> None:
    with Client("http://127.0.0.1:1") as client, pytest.raises(ConnectionFailedError):
        client.health()


def answering(content: bytes, status: int = 200) -> Client:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=content))
    return Client(transport=transport)


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b"{}", b'{"choices": 5}'])
def test_replies_that_make_no_sense(content: bytes) -> None:
    with pytest.raises(BadReplyError):
        answering(content).chat("hi")


@pytest.mark.parametrize("content", [b"<html>", b"{}", b'{"error": "no"}', b"\xff"])
def test_errors_without_our_shape(content: bytes) -> None:
    with pytest.raises(ServerError, match="status 502") as caught:
        answering(content, 502).chat("hi")
    assert caught.value.status == 502


def test_stream_that_breaks_off_is_an_error() -> None:
    chunk = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
    events = answering(chunk).stream_chat("hi")
    assert next(events) == TextChunk(text="x")
    with pytest.raises(ConnectionFailedError, match="broke off"):
        next(events)
    with pytest.raises(BadReplyError):
        list(answering(b"data: {}\n\n").stream_chat("hi"))
    with pytest.raises(BadReplyError):
        list(answering(b"data: 5\n\n").stream_chat("hi"))


def test_key_is_sent_as_bearer() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(200, json={"data": []})

    Client(api_key="secret", transport=httpx.MockTransport(answer)).models()
    assert seen == ["Bearer secret"]


@pytest.mark.anyio
async def test_async_client_has_the_same_methods_and_results(client: Client) -> None:
    public = {name for name in dir(Client) if not name.startswith("_")} - {"close"}
    assert public == {name for name in dir(AsyncClient) if not name.startswith("_")} - {"aclose"}
    transport = httpx.ASGITransport(make_app())
    async with AsyncClient("http://test", transport=transport) as other:
        both = ["text", "image"]
        mine = await other.chat("hi", seed=5, modalities=both)
        assert mine.choices == client.chat("hi", seed=5, modalities=both).choices
        events = [e async for e in other.stream_chat("hi", seed=5, modalities=both)]
        assert events == list(client.stream_chat("hi", seed=5, modalities=both))
        completed = await other.complete("a", seed=5)
        assert completed.choices == client.complete("a", seed=5).choices
        chunks = [e async for e in other.stream_complete("a", seed=5)]
        assert chunks == list(client.stream_complete("a", seed=5))
        assert await other.generate_images("a", seed=5) == client.generate_images("a", seed=5)
        images = [e async for e in other.stream_images("a", seed=5)]
        assert images == list(client.stream_images("a", seed=5))
        assert [m.id for m in await other.models()] == ["fake"]
        assert (await other.health()).is_ready
        with pytest.raises(BadRequestError):
            await other.chat("hi", n=99)
        with pytest.raises(NotFoundError):
            _ = [e async for e in other.stream_chat("hi", model="gpt")]
