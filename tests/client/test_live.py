"""Both clients against the real application on a real socket; only the model is missing."""

from __future__ import annotations

import asyncio
import inspect
import io
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from momaserve.errors import EngineDeadError as EngineIsDead
from momaserve.errors import MomaserveError, PromptError
from momaserve.errors import QueueFullError as QueueIsFull
from momaserve.outputs import FinishReason
from momaserve_client import (
    ApiError,
    AsyncClient,
    CallOptions,
    Client,
    CompletionChunk,
    DeadlineError,
    DrainingError,
    EngineDeadError,
    FinishChunk,
    Health,
    ImageChunk,
    ImageOptions,
    InvalidPromptError,
    ModelNotFoundError,
    Options,
    QueueFullError,
    RequestAbortedError,
    RequestNotFoundError,
    Retries,
    ServerError,
    TextChunk,
    TokensChunk,
    TooLargeError,
    UnknownFieldError,
    UsageChunk,
    message,
    picture,
)
from momaserve_server.schemas_common import GenerationFields, IgnoredFields, SamplingFields
from tests.client.conftest import Connect
from tests.server.asgi import TIMEOUT_S
from tests.server.fake_engine import TEXT, FakeAsyncEngine, byte_ids
from tests.server.live import Live, live

BOTH = ["text", "image"]


@pytest.fixture(scope="module")
def running() -> Generator[Live, None, None]:
    with live() as started:
        yield started


@pytest.fixture
def client(running: Live, connect: Connect) -> Client:
    return connect(running.url)


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
    assert reply.request_id
    assert reply.id == f"chatcmpl-{reply.request_id}"


def test_chat_with_pictures_both_ways(client: Client) -> None:
    reply = client.chat([picture(red()), "what?"], modalities=BOTH, seed=1)
    assert [type(part).__name__ for part in reply.parts] == ["str", "Png", "str"]
    assert Image.open(io.BytesIO(reply.images[0])).size == (8, 8)
    assert reply.usage.image_tokens == 4
    more = client.chat(
        [message("user", "draw"), message("assistant", *reply.parts), message("user", "again")]
    )
    assert more.usage.prompt_tokens > reply.usage.prompt_tokens


def test_stream_equals_whole(client: Client) -> None:
    options: Any = {"modalities": BOTH, "seed": 2, "return_token_ids": True, "top_logprobs": 1}
    whole = client.chat("hi", **options)
    stream = client.stream_chat("hi", **options)
    events = list(stream)
    text = "".join(event.text for event in events if isinstance(event, TextChunk))
    images = [event for event in events if isinstance(event, ImageChunk)]
    tokens = [event for event in events if isinstance(event, TokensChunk)]
    assert text == whole.text
    assert [image.tokens_done for image in images] == [1, 2, 3, 4]
    assert tuple(image.png for image in images if image.is_whole) == whole.images
    ids = tuple(token for event in tokens for token in event.token_ids)
    assert ids == whole.choices[0].token_ids
    logprobs = [entry for event in tokens for entry in (event.logprobs or {})["content"]]
    assert whole.choices[0].logprobs == {"content": logprobs, "refusal": None}
    assert FinishChunk(reason="stop") in events
    assert events[-1] == UsageChunk(usage=whole.usage)
    assert stream.id == f"chatcmpl-{stream.request_id}"


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
    assert events[-1] == UsageChunk(usage=reply.usage)


def test_images(client: Client) -> None:
    reply = client.generate_images("apple", n=2, seed=3, size="8x8")
    assert len(reply.images) == 2
    assert reply.usage.completion_tokens == 8
    events = list(client.stream_images("apple", n=2, seed=3, partial_images=1))
    assert tuple(event.png for event in events if event.is_whole) == reply.images
    assert sum(not event.is_whole for event in events) == 2
    assert [event.usage is not None for event in events] == [event.is_whole for event in events]


def test_models_version_and_health(client: Client) -> None:
    (model,) = client.models()
    assert (model.id, model.modalities) == ("fake", ("text", "image"))
    assert model.raw["limits"]["n"] == 16
    assert client.version().model == "fake"
    assert client.health() == Health(is_healthy=True, is_ready=True)


def waiting(running: Live, client: Client) -> Any:
    """A stream whose answer is held back after its first event."""
    running.fake.gate = asyncio.Semaphore(3)
    stream = client.stream_chat("hi", request_id="held-back")
    assert isinstance(next(stream), TextChunk)
    return stream


def ended(running: Live) -> list[str]:
    """The requests that were aborted, once the one at hand is over."""

    async def wait() -> None:
        while running.fake.running:
            running.fake.stopped.clear()
            await running.fake.stopped.wait()

    asyncio.run_coroutine_threadsafe(wait(), running.loop).result(TIMEOUT_S)
    return running.fake.aborted


def test_closing_a_stream_aborts(connect: Connect) -> None:
    with live() as running:
        with waiting(running, connect(running.url)):
            assert len(running.fake.running) == 1
        assert len(ended(running)) == 1


def test_abort_by_id(connect: Connect) -> None:
    with live() as running:
        client, other = connect(running.url), connect(running.url)
        stream = waiting(running, client)
        aborted = other.abort(stream.request_id)
        assert aborted.id == stream.request_id
        with pytest.raises(RequestAbortedError) as caught:
            list(stream)
        assert caught.value.request_id == stream.request_id
        with pytest.raises(RequestNotFoundError):
            other.abort("never-was")


@pytest.mark.parametrize(
    ("refusal", "cls", "code"),
    [
        (PromptError("no", param="prompt"), InvalidPromptError, "invalid_prompt"),
        (QueueIsFull("full", retry_after_s=7), QueueFullError, "queue_full"),
        (EngineIsDead("dead"), EngineDeadError, "engine_dead"),
        (MomaserveError("odd"), ServerError, "internal_error"),
    ],
)
def test_errors_mirror_the_servers(
    running: Live, connect: Connect, refusal: MomaserveError, cls: type[ApiError], code: str
) -> None:
    client = connect(running.url, retries=Retries(max_retries=0))
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
            assert type(caught.value) is cls
            assert caught.value.code == code
            assert str(caught.value) == str(refusal)
            assert caught.value.request_id
    finally:
        running.fake.refusal = None
    if cls is QueueFullError:
        assert caught.value.retry_after_s == 7
    if cls is InvalidPromptError:
        assert caught.value.param == "prompt"


def test_other_statuses(client: Client, connect: Connect) -> None:
    with pytest.raises(ModelNotFoundError):
        client.chat("hi", model="gpt")
    with pytest.raises(UnknownFieldError) as caught:
        client.chat("hi", colour="red")  # type: ignore[call-arg]
    assert caught.value.param == "colour"
    with live(max_body_bytes=10) as small, pytest.raises(TooLargeError):
        connect(small.url).chat("hi")


def test_a_draining_server(connect: Connect) -> None:
    fake = FakeAsyncEngine()
    fake.is_draining = True
    with live(fake) as started:
        client = connect(started.url, retries=Retries(max_retries=0))
        assert client.health() == Health(is_healthy=True, is_ready=False, reason="draining")
        with pytest.raises(DrainingError) as caught:
            client.chat("hi")
    assert caught.value.retry_after_s == 5


def test_an_error_inside_a_stream(connect: Connect) -> None:
    fake = FakeAsyncEngine()
    fake.failure = (2, FinishReason.ABORT)
    with live(fake) as started:
        stream = connect(started.url).stream_chat("hi")
        assert isinstance(next(stream), TextChunk)
        with pytest.raises(RequestAbortedError) as caught:
            list(stream)
    assert caught.value.status is None


def test_deadlines(connect: Connect) -> None:
    fake = FakeAsyncEngine()
    fake.failure = (2, FinishReason.TIMEOUT)
    with live(fake) as started:
        client = connect(started.url)
        reply = client.chat("hi", timeout_s=1)
        assert (reply.text, reply.choices[0].finish_reason) == (TEXT[:2], "timeout")
        assert FinishChunk(reason="timeout") in list(client.stream_chat("hi", timeout_s=1))
        with pytest.raises(DeadlineError) as caught:
            client.generate_images("hi", timeout_s=1)
        assert (caught.value.status, caught.value.code) == (408, "timeout")
        assert caught.value.should_retry is False
        with pytest.raises(DeadlineError):
            list(client.stream_images("hi", timeout_s=1))


def test_cached_tokens(connect: Connect) -> None:
    fake = FakeAsyncEngine()
    fake.num_cached_tokens = 3
    with live(fake) as started:
        client = connect(started.url)
        assert client.chat("hi").usage.cached_tokens == 3
        assert client.complete("hi").usage.cached_tokens == 3
        assert client.generate_images("hi").usage.cached_tokens == 3


def test_one_client_for_many_threads(running: Live) -> None:
    with Client(running.url) as client, ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda seed: client.chat("hi", seed=seed).text, range(32))
        assert list(texts) == [f"{TEXT}{seed}" for seed in range(32)]


def test_every_option_is_a_field_of_the_server() -> None:
    """And the other way round, but for those that the methods name or the client sets."""
    own = {"stream", "stream_options"}
    call = {*CallOptions.__annotations__}
    text = {*SamplingFields.model_fields} - {*IgnoredFields.model_fields} - own
    images = {*GenerationFields.model_fields} - {*IgnoredFields.model_fields} - own
    assert {*Options.__annotations__} - call == text
    assert {*ImageOptions.__annotations__} - call == images


def test_both_clients_have_the_same_methods() -> None:
    def methods(cls: type) -> dict[str, Any]:
        found = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
        return {name: value for name, value in found.items() if name not in ("close", "aclose")}

    mine, other = methods(Client), methods(AsyncClient)
    assert list(mine) == list(other)
    for name in mine:
        ours, theirs = inspect.signature(mine[name]), inspect.signature(other[name])
        assert ours.parameters == theirs.parameters, name
        result = str(theirs.return_annotation).replace("AsyncStream", "Stream")
        assert str(ours.return_annotation) == result, name
        assert mine[name].__doc__ == other[name].__doc__
