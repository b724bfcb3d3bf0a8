"""The client against `momaserve serve` with the demo: every route, and a server that is killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from momaserve_client import (
    Client,
    ConnectionFailedError,
    FinishChunk,
    ImageChunk,
    NotConnectedError,
    Png,
    RequestAbortedError,
    Retries,
    TextChunk,
    TokensChunk,
    UsageChunk,
    message,
)
from tests.client.conftest import Connect
from tests.e2e.conftest import READY_TIMEOUT_S, LiveServer, start_server, stop_server

BOTH = ["text", "image"]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    live = start_server()
    yield live
    assert stop_server(live) == 0


@pytest.fixture
def client(server: LiveServer, connect: Connect) -> Client:
    return connect(server.url)


@pytest.fixture(scope="module")
def apple(server: LiveServer) -> Png:
    with Client(server.url) as client:
        return client.generate_images("red apple", seed=7).images[0]


def test_text_and_pictures_both_ways(client: Client, apple: Png) -> None:
    assert "instrument" in client.chat("define violin", temperature=0).text
    assert client.chat("red apple", modalities=BOTH, seed=7).images == (apple,)
    said = [message("user", "define violin"), message("assistant", "a thing with strings")]
    assert client.chat([*said, message("user", apple, "what is this?")], temperature=0).text


def test_streams_equal_whole_replies(client: Client, apple: Png) -> None:
    whole = client.chat("red apple", modalities=BOTH, seed=7)
    stream = client.stream_chat("red apple", modalities=BOTH, seed=7, partial_images=16)
    events = list(stream)
    images = [event for event in events if isinstance(event, ImageChunk)]
    assert images[-1].png == apple == whole.images[0]
    assert len(images) == 17
    assert [image.is_whole for image in images] == [False] * 16 + [True]
    assert events[-2:] == [FinishChunk(reason="stop"), UsageChunk(usage=whole.usage)]
    *partial, last = client.stream_images("red apple", seed=7, partial_images=3)
    assert (len(partial), last.png, last.is_whole) == (3, apple, True)


def test_routing_has_one_entry_per_token(client: Client) -> None:
    options = {"modalities": BOTH, "seed": 1, "return_token_ids": True, "include_routing": True}
    for prompt in ("define violin", "red apple"):
        (choice,) = client.chat(prompt, **options).choices  # type: ignore[arg-type]
        assert choice.routing is not None
        assert tuple(entry.token_id for entry in choice.routing) == choice.token_ids
        assert all(entry.experts is not None for entry in choice.routing[:-1])
        events = client.stream_chat(prompt, **options)  # type: ignore[arg-type]
        tokens = [event for event in events if isinstance(event, TokensChunk)]
        assert tuple(i for event in tokens for i in event.token_ids) == choice.token_ids
        assert tuple(it for event in tokens for it in event.routing) == choice.routing


def test_scoring_and_tokens(client: Client) -> None:
    tokens = client.tokenize("define violin", return_token_strs=True)
    assert tokens.token_strs is not None
    assert len(tokens.token_strs) == tokens.count == len(tokens.modalities)
    scored = client.complete("define violin", echo=True, logprobs=0, max_tokens=0).choices[0]
    assert scored.logprobs is not None
    assert len(scored.logprobs.token_logprobs) == tokens.count
    bare = client.tokenize("define violin", add_special_tokens=False)
    assert client.detokenize(bare.tokens).text == "define violin"


def test_pictures_in_tokens(client: Client, apple: Png) -> None:
    tokens = client.tokenize(messages=[apple, "what is this?"])
    (span,) = tokens.image_spans
    assert set(tokens.modalities[span.start : span.end]) >= {"image"}
    parts = client.detokenize(tokens.tokens[span.start : span.end]).parts
    assert [type(part) for part in parts] == [Png]


def test_edits_keep_the_first_rows(client: Client, apple: Png) -> None:
    edited = client.edit_images(apple, "red apple", keep_rows=4, seed=1, n=2)
    assert len(edited.images) == 2
    *partial, last = client.stream_edits(apple, "red apple", keep_rows=4, seed=1, partial_images=2)
    assert (len(partial), last.is_whole) == (2, True)
    assert last.png == edited.images[0]


def test_router_counts(client: Client) -> None:
    before = {group.name: group.num_tokens for group in client.router().groups}
    client.generate_images("red apple", seed=7)
    after = {group.name: group.num_tokens for group in client.router().groups}
    assert after["image"] >= before["image"] + 63  # the last code is not computed
    assert client.health().is_ready
    assert client.models()[0].modalities == ("text", "image")


def test_abort(client: Client, connect: Connect, server: LiveServer) -> None:
    options = {"modalities": ["text"], "ignore_eos": True, "request_id": "to-be-aborted"}
    with client.stream_chat("define violin", **options) as stream:  # type: ignore[arg-type]
        assert isinstance(next(stream), TextChunk)
        assert connect(server.url).abort(stream.request_id).id == "to-be-aborted"
        with pytest.raises(RequestAbortedError):
            list(stream)


def test_a_server_that_is_killed(connect: Connect) -> None:
    server = start_server()
    client = connect(server.url, retries=Retries(max_retries=0))
    try:
        stream = client.stream_chat("define violin", ignore_eos=True)
        assert isinstance(next(stream), TextChunk)
        server.process.kill()
        with pytest.raises(ConnectionFailedError, match="before the answer was whole") as caught:
            list(stream)
        assert caught.value.request_id == stream.request_id
        server.process.wait(READY_TIMEOUT_S)  # until then the system answers for it
        with pytest.raises(NotConnectedError):
            client.health()
    finally:
        server.process.kill()
        server.process.communicate(timeout=READY_TIMEOUT_S)
