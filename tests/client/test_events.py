"""Streams as events: what each becomes, wherever the bytes are cut, however the stream ends."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from momaserve_client import (
    BadReplyError,
    Client,
    CompletionChunk,
    ConnectionFailedError,
    EngineDeadError,
    FinishChunk,
    ImageChunk,
    Png,
    TextChunk,
    TokenRouting,
    TokensChunk,
    Usage,
    UsageChunk,
)
from tests.client.both import (
    DONE,
    PNG,
    Pieces,
    answer,
    chat_payload,
    event,
    events,
    join,
    text_chunk,
)
from tests.client.test_replies import B64, ROUTED, ROUTING

Answering = Callable[..., Client]
USAGE = {"prompt_tokens": 1, "completion_tokens": 2}


def chunk(**choice: Any) -> bytes:
    first = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None} | choice
    return event({"id": "chatcmpl-7", "choices": [first]})


IMAGE = {"index": 0, "tokens_done": 2, "tokens_total": 4, "b64_json": B64}
CHAT = [
    chunk(delta={"role": "assistant", "content": ""}),
    chunk(delta={"content": "Grüße"}, token_ids=[5], logprobs={"content": []}),
    b": a comment\n\n",
    chunk(delta={"image": IMAGE}),
    chunk(delta={"image": IMAGE | {"tokens_done": 4}}, index=1),
    chunk(token_ids=[5, 6], routing=ROUTING),
    chunk(finish_reason="stop", newer="than this client"),
    event({"id": "chatcmpl-7", "choices": [], "usage": USAGE}),
    DONE,
]
CHAT_EVENTS = [
    TextChunk(text="Grüße"),
    TokensChunk(token_ids=(5,), logprobs={"content": []}),
    ImageChunk(png=Png(PNG), is_whole=False, tokens_done=2, tokens_total=4),
    ImageChunk(png=Png(PNG), is_whole=True, choice=1, tokens_done=4, tokens_total=4),
    TokensChunk(token_ids=(5, 6), routing=ROUTED),
    FinishChunk(reason="stop"),
    UsageChunk(usage=Usage(prompt_tokens=1, completion_tokens=2)),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100_000])
def test_chat_cut_anywhere(answering: Answering, size: int) -> None:
    stream = answering(events(*join(CHAT, size), x_request_id="r1")).stream_chat("hi")
    assert list(stream) == CHAT_EVENTS
    assert (stream.id, stream.request_id) == ("chatcmpl-7", "r1")


@pytest.mark.parametrize("line_break", [b"\r\n", b"\r"])
def test_line_breaks_of_other_servers(answering: Answering, line_break: bytes) -> None:
    pieces = [piece.replace(b"\n", line_break) for piece in join(CHAT, 1)]
    assert list(answering(events(*pieces)).stream_chat("hi")) == CHAT_EVENTS


def test_compressed_streams(answering: Answering) -> None:
    packed = gzip.compress(b"".join(CHAT))
    reply = events(*join([packed], 7), content_encoding="gzip")
    assert list(answering(reply).stream_chat("hi")) == CHAT_EVENTS


def test_completions(answering: Answering) -> None:
    logprobs = {
        "tokens": ["a"],
        "token_logprobs": [-1.0],
        "top_logprobs": [{}],
        "text_offset": [0],
    }

    def piece(**choice: Any) -> bytes:
        first = {"index": 0, "text": "", "logprobs": None, "finish_reason": None} | choice
        return event({"id": "cmpl-7", "choices": [first]})

    sent = [
        piece(text="a", logprobs=logprobs, token_ids=[5]),
        piece(routing=ROUTING[:1]),
        piece(finish_reason="stop"),
        event({"choices": [], "usage": USAGE}),
        DONE,
    ]
    first, second, *rest = list(answering(events(*sent)).stream_complete("a"))
    assert isinstance(first, CompletionChunk)
    assert (first.text, first.token_ids) == ("a", (5,))
    assert first.logprobs is not None
    assert second == CompletionChunk(text="", routing=ROUTED[:1])
    assert rest == [
        FinishChunk(reason="stop"),
        UsageChunk(usage=Usage(prompt_tokens=1, completion_tokens=2)),
    ]


def image_event(kind: str, index: int = 0, **fields: Any) -> bytes:
    return event({"type": kind, "index": index, "b64_json": B64, **fields}, kind)


@pytest.mark.parametrize("route", ["image_generation", "image_edit"])
def test_images(answering: Answering, route: str) -> None:
    usage = {"input_tokens": 1, "output_tokens": 4}
    sent = [
        image_event(f"{route}.partial_image"),
        event({"type": f"{route}.newer_than_this_client"}),
        image_event(f"{route}.completed", 1, usage=usage),
        image_event(f"{route}.completed"),
        b"data: nobody reads on\n\n",
    ]
    client = answering(events(*sent))
    stream = client.stream_images("a", n=2)
    if route == "image_edit":
        stream = client.stream_edits(PNG, "a", n=2)
    found = list(stream)
    assert [(image.is_whole, image.choice) for image in found] == [
        (False, 0),
        (True, 1),
        (True, 0),
    ]
    assert found[1].usage == Usage(prompt_tokens=1, completion_tokens=4, image_tokens=4)
    assert all(image.png == PNG for image in found)


def test_images_that_stop_short(answering: Answering) -> None:
    sent = events(image_event("image_generation.completed"))
    stream = answering(sent).stream_images("a", n=2)
    assert next(stream).is_whole
    with pytest.raises(ConnectionFailedError, match="before the answer was whole"):
        next(stream)


def test_what_came_before_an_error_is_given_out(answering: Answering) -> None:
    """Even in one piece with it."""
    error = event({"error": {"message": "dead", "code": "engine_dead"}}, "error")
    stream = answering(events(text_chunk("a") + text_chunk("b") + error + DONE)).stream_chat("hi")
    assert next(stream) == TextChunk(text="a")
    assert next(stream) == TextChunk(text="b")
    with pytest.raises(EngineDeadError):
        next(stream)
    assert list(stream) == []  # it is over


@pytest.mark.parametrize(
    "last",
    [
        [],
        [b'data: {"choices"'],
        [b'data: {"choices": []}'],  # an event that no empty line ends is none
        [httpx.RemoteProtocolError("peer closed connection")],
        [httpx.ReadError("reset")],
    ],
)
def test_a_server_that_dies(answering: Answering, last: list[Any]) -> None:
    body = Pieces([text_chunk("a"), *last])
    reply = httpx.Response(200, stream=body, headers={"content-type": "text/event-stream"})
    stream = answering(reply).stream_chat("hi", request_id="mine")
    assert next(stream) == TextChunk(text="a")
    with pytest.raises(ConnectionFailedError, match="before the answer was whole") as caught:
        next(stream)
    assert caught.value.request_id == "mine"
    assert body.is_closed


def test_a_server_that_dies_after_its_last_word(answering: Answering) -> None:
    stream = answering(events(text_chunk("a"), DONE, httpx.ReadError("reset"))).stream_chat("hi")
    assert list(stream) == [TextChunk(text="a")]


@pytest.mark.parametrize(
    "garbage",
    [
        b"data: {}\n\n",
        b"data: 5\n\n",
        b"data: \n\n",
        b"data: {no json\n\n",
        b"data: \xff\xfe\n\n",
        b'data: {"choices": 5}\n\n',
        b'data: {"choices": [5]}\n\n',
        b'data: {"choices": [{"index": "0"}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {"content": 5}}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {"image": 5}}]}\n\n',
        b"data: " + b"[" * 100_000 + b"\n\n",
    ],
    ids=range(11),
)
def test_garbage(answering: Answering, garbage: bytes) -> None:
    stream = answering(events(text_chunk("a"), garbage)).stream_chat("hi")
    assert next(stream) == TextChunk(text="a")
    with pytest.raises(BadReplyError, match="unexpected reply"):
        next(stream)


def test_pictures_that_are_none(answering: Answering) -> None:
    for wrong in ("@@@", f"{B64[:8]}@{B64[8:]}", "", base64.b64encode(b"<html>").decode(), 5, None):
        sent = events(event({"type": "image_generation.completed", "b64_json": wrong}))
        with pytest.raises(BadReplyError):
            list(answering(sent).stream_images("a"))


@pytest.mark.parametrize(
    "reply",
    [
        answer(payload=chat_payload()),
        answer(payload=b"<html>log in</html>", content_type="text/html"),
        answer(payload=b""),
    ],
)
def test_answers_that_are_no_stream(answering: Answering, reply: httpx.Response) -> None:
    with pytest.raises(BadReplyError, match="expected a stream of events"):
        list(answering(reply).stream_chat("hi"))


def test_closing_early_closes_the_connection(answering: Answering) -> None:
    def body() -> Pieces:
        return Pieces([text_chunk("a"), text_chunk("b"), DONE])

    def opened(pieces: Pieces) -> Any:
        head = {"content-type": "text/event-stream"}
        return answering(httpx.Response(200, stream=pieces, headers=head)).stream_chat("hi")

    for_close, for_with, for_error = body(), body(), body()
    stream = opened(for_close)
    assert next(stream)
    assert not for_close.is_closed
    stream.close()
    stream.close()
    assert for_close.is_closed
    assert list(stream) == []
    with opened(for_with) as stream:
        for _ in stream:
            break
        assert not for_with.is_closed
    assert for_with.is_closed
    with pytest.raises(KeyboardInterrupt), opened(for_error) as stream:
        next(stream)
        raise KeyboardInterrupt
    assert for_error.is_closed


def test_a_stream_that_nobody_reads_sends_nothing(answering: Answering) -> None:
    client = answering(httpx.ConnectError("refused"))
    with client.stream_chat("hi", request_id="mine") as stream:
        assert stream.request_id == "mine"
    client.stream_chat("hi").close()


def test_leaving_a_loop_is_enough_without_async() -> None:
    """The loop holds the only reference."""
    body = Pieces([text_chunk("a"), text_chunk("b"), DONE])
    reply = httpx.Response(200, stream=body, headers={"content-type": "text/event-stream"})
    with Client(transport=httpx.MockTransport(lambda request: reply)) as client:
        for _ in client.stream_chat("hi"):
            break
        assert body.is_closed


def test_routing_over_a_whole_stream(answering: Answering) -> None:
    """Entries lag behind their tokens; both together are one entry per token."""
    late = {"token_id": 6, "group": "text", "experts": [[1]]}
    sent = [
        chunk(delta={"content": "a"}, token_ids=[5]),
        chunk(delta={"content": "b"}, token_ids=[6], routing=[late | {"token_id": 5}]),
        chunk(routing=[late]),
        DONE,
    ]
    found = [e for e in answering(events(*sent)).stream_chat("hi") if isinstance(e, TokensChunk)]
    assert [token for e in found for token in e.token_ids] == [5, 6]
    assert [entry for e in found for entry in e.routing] == [
        TokenRouting(token_id=token, group="text", experts=((1,),)) for token in (5, 6)
    ]
