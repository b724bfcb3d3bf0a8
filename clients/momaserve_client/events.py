"""Reads streams: bytes -> events, and whether the stream came to its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from momaserve_client.errors import BadReplyError, ConnectionFailedError, stream_error
from momaserve_client.fields import Json, as_count, as_object, as_png, as_text, many, maybe
from momaserve_client.replies import (
    completion_logprobs,
    expected,
    image_usage,
    routing,
    usage,
)
from momaserve_client.sse import ServerEvent, SSEDecoder
from momaserve_client.types import (
    ChatEvent,
    CompletionChunk,
    CompletionEvent,
    FinishChunk,
    ImageChunk,
    TextChunk,
    TokensChunk,
    UsageChunk,
)

Event = TypeVar("Event")
EVENT_STREAM = "text/event-stream"
DONE = "[DONE]"


class EventReader(Generic[Event]):
    """Owns what has arrived of one stream. Knows when the stream is whole."""

    def __init__(
        self, parse: Callable[[Json], Iterator[Event]], *, num_images: int | None = None
    ) -> None:
        """
        Args:
            num_images: whole pictures that end the stream; None for one that ends with [DONE].
        """
        self._parse = parse
        self._decoder = SSEDecoder()
        self._images_left = num_images
        self.is_done = False
        self.reply_id: str | None = None
        """`id` of the reply, as soon as an event has named it."""

    def begin(self, content_type: str) -> None:
        """Raises BadReplyError when the answer is no stream, such as a proxy's page."""
        if content_type.partition(";")[0].strip().lower() != EVENT_STREAM:
            raise BadReplyError(f"expected a stream of events, got {content_type or 'no type'!r}")

    def feed(self, piece: bytes) -> Iterator[Event]:
        """The events that `piece` completes, one by one; nothing once the stream is whole.

        Raises:
            ApiError: an `error` event; what came before it has been given out.
            BadReplyError: the same for an event that makes no sense.
        """
        if self.is_done:
            return
        for event in self._decoder.feed(piece):
            if event.data == DONE:
                self.is_done = True
            else:
                yield from self._read(event)
            if self.is_done:
                return

    def finish(self) -> None:
        """The connection is over. Raises ConnectionFailedError when the stream is not."""
        if not self.is_done:
            raise ConnectionFailedError("the connection was closed before the answer was whole")

    def _read(self, event: ServerEvent) -> list[Event]:
        body = event.data.encode()
        with expected(body):
            payload = as_object(json.loads(body))
        if payload.get("error") or event.event == "error":
            raise stream_error(payload)
        if isinstance(payload.get("id"), str):
            self.reply_id = payload["id"]
        with expected(body):
            found = list(self._parse(payload))
        if self._images_left is not None:
            self._images_left -= sum(isinstance(i, ImageChunk) and i.is_whole for i in found)
            self.is_done = self._images_left <= 0
        return found


def chat_events(payload: Json) -> Iterator[ChatEvent]:
    """Events of one chunk of a chat stream."""
    for choice in payload["choices"]:
        index, delta = as_count(choice["index"]), choice.get("delta") or {}
        if delta.get("content"):
            yield TextChunk(text=as_text(delta["content"]), choice=index)
        if delta.get("image"):
            image = delta["image"]
            done, total = as_count(image["tokens_done"]), as_count(image["tokens_total"])
            yield ImageChunk(
                png=as_png(image["b64_json"]),
                is_whole=done == total,
                choice=index,
                index=as_count(image["index"]),
                tokens_done=done,
                tokens_total=total,
            )
        if choice.get("token_ids") or choice.get("logprobs") or choice.get("routing"):
            yield TokensChunk(
                choice=index,
                token_ids=many(choice.get("token_ids") or [], as_count),
                logprobs=maybe(choice.get("logprobs"), dict),
                routing=routing(choice.get("routing") or []),
            )
        if choice.get("finish_reason") is not None:
            yield FinishChunk(reason=as_text(choice["finish_reason"]), choice=index)
    if payload.get("usage"):
        yield UsageChunk(usage=usage(payload["usage"]))


def completion_events(payload: Json) -> Iterator[CompletionEvent]:
    """Events of one chunk of a completion stream."""
    for choice in payload["choices"]:
        index = as_count(choice["index"])
        names = ("text", "logprobs", "token_ids", "routing")
        if any(choice.get(name) for name in names):
            yield CompletionChunk(
                text=as_text(choice["text"]),
                choice=index,
                token_ids=many(choice.get("token_ids") or [], as_count),
                logprobs=maybe(choice.get("logprobs"), completion_logprobs),
                routing=routing(choice.get("routing") or []),
            )
        if choice.get("finish_reason") is not None:
            yield FinishChunk(reason=as_text(choice["finish_reason"]), choice=index)
    if payload.get("usage"):
        yield UsageChunk(usage=usage(payload["usage"]))


def image_events(payload: Json) -> Iterator[ImageChunk]:
    """Events of both images routes; kinds that are newer than this client are skipped."""
    kind = as_text(payload["type"]).partition(".")[2]
    if kind in ("partial_image", "completed"):
        yield ImageChunk(
            png=as_png(payload["b64_json"]),
            is_whole=kind == "completed",
            choice=as_count(payload.get("index", 0)),
            usage=maybe(payload.get("usage"), image_usage),
        )
