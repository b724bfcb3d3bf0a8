"""Reads replies: pure functions from JSON to the objects of `types`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from momaserve_client.errors import BadReplyError, ConnectionFailedError, stream_error
from momaserve_client.sse import ServerEvent, SSEDecoder
from momaserve_client.types import (
    ChatChoice,
    ChatEvent,
    ChatReply,
    CompletionChoice,
    CompletionChunk,
    CompletionEvent,
    CompletionLogprobs,
    CompletionReply,
    FinishChunk,
    ImageChunk,
    ImagesReply,
    Model,
    TextChunk,
    Usage,
    UsageChunk,
)

Parsed = TypeVar("Parsed")
Json = Mapping[str, Any]


def parsed(body: bytes, parse: Callable[[Json], Parsed]) -> Parsed:
    """`parse` of a JSON body. Raises BadReplyError when it is not what was expected."""
    try:
        return parse(json.loads(body))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadReplyError(f"unexpected reply: {type(error).__name__}: {error}") from error


def chat_reply(payload: Json) -> ChatReply:
    return ChatReply(
        id=payload["id"],
        model=payload["model"],
        choices=tuple(_chat_choice(choice) for choice in payload["choices"]),
        usage=_usage(payload["usage"]),
    )


def completion_reply(payload: Json) -> CompletionReply:
    return CompletionReply(
        id=payload["id"],
        model=payload["model"],
        choices=tuple(
            CompletionChoice(
                index=choice["index"],
                text=choice["text"],
                finish_reason=choice["finish_reason"],
                token_ids=_token_ids(choice),
                logprobs=_completion_logprobs(choice["logprobs"]),
            )
            for choice in payload["choices"]
        ),
        usage=_usage(payload["usage"]),
    )


def images_reply(payload: Json) -> ImagesReply:
    return ImagesReply(
        images=tuple(base64.b64decode(item["b64_json"]) for item in payload["data"]),
        usage=_image_usage(payload["usage"]),
    )


def models(payload: Json) -> list[Model]:
    return [
        Model(
            id=item["id"],
            max_model_len=item["max_model_len"],
            modalities=tuple(item["modalities"]),
            raw=item,
        )
        for item in payload["data"]
    ]


class EventReader:
    """Bytes of a stream -> parsed events. Knows when the stream is whole."""

    def __init__(
        self, parse: Callable[[Json], Iterator[Any]], *, num_images: int | None = None
    ) -> None:
        """
        Args:
            num_images: whole pictures that end the stream; None for one that ends with [DONE].
        """
        self._parse = parse
        self._decoder = SSEDecoder()
        self._images_left = num_images
        self.is_done = False

    def feed(self, piece: bytes) -> list[Any]:
        """Raises ApiError for an `error` event, BadReplyError for one that makes no sense."""
        found: list[Any] = []
        for event in self._decoder.feed(piece):
            if event.data == "[DONE]":
                self.is_done = True
            else:
                found += self._read(event)
        return found

    def finish(self) -> None:
        """The connection is over. Raises ConnectionFailedError when the stream is not."""
        if not self.is_done:
            raise ConnectionFailedError("the stream broke off before its end")

    def _read(self, event: ServerEvent) -> list[Any]:
        payload = parsed(event.data.encode(), _as_object)
        if "error" in payload:
            raise stream_error(payload)
        try:
            found = list(self._parse(payload))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise BadReplyError(f"unexpected event: {type(error).__name__}: {error}") from error
        if self._images_left is not None:
            self._images_left -= sum(isinstance(i, ImageChunk) and i.is_whole for i in found)
            self.is_done = self._images_left <= 0
        return found


def chat_events(payload: Json) -> Iterator[ChatEvent]:
    """Events of one chunk of a chat stream."""
    for choice in payload["choices"]:
        index, delta = choice["index"], choice["delta"]
        if delta.get("content"):
            yield TextChunk(text=delta["content"], choice=index)
        if delta.get("image"):
            image = delta["image"]
            yield ImageChunk(
                png=base64.b64decode(image["b64_json"]),
                is_whole=image["tokens_done"] == image["tokens_total"],
                choice=index,
                index=image["index"],
                tokens_done=image["tokens_done"],
                tokens_total=image["tokens_total"],
            )
        if choice["finish_reason"] is not None:
            yield FinishChunk(reason=choice["finish_reason"], choice=index)
    if payload.get("usage"):
        yield UsageChunk(usage=_usage(payload["usage"]))


def completion_events(payload: Json) -> Iterator[CompletionEvent]:
    """Events of one chunk of a completion stream."""
    for choice in payload["choices"]:
        if choice["text"] or choice["logprobs"] or choice.get("token_ids"):
            yield CompletionChunk(
                text=choice["text"],
                choice=choice["index"],
                token_ids=_token_ids(choice),
                logprobs=_completion_logprobs(choice["logprobs"]),
            )
        if choice["finish_reason"] is not None:
            yield FinishChunk(reason=choice["finish_reason"], choice=choice["index"])
    if payload.get("usage"):
        yield UsageChunk(usage=_usage(payload["usage"]))


def image_events(payload: Json) -> Iterator[ImageChunk]:
    """Events of the images route."""
    yield ImageChunk(
        png=base64.b64decode(payload["b64_json"]),
        is_whole=payload["type"] == "image_generation.completed",
        choice=payload["index"],
    )


def _as_object(payload: Any) -> Json:
    if not isinstance(payload, Mapping):
        raise TypeError(f"expected an object, got {type(payload).__name__}")
    return payload


def _chat_choice(choice: Json) -> ChatChoice:
    content = choice["message"]["content"]
    parts = [content] if isinstance(content, str) else [_part(part) for part in content]
    return ChatChoice(
        index=choice["index"],
        parts=tuple(parts),
        finish_reason=choice["finish_reason"],
        token_ids=_token_ids(choice),
        logprobs=choice.get("logprobs"),
    )


def _part(part: Json) -> str | bytes:
    if part["type"] == "text":
        return str(part["text"])
    return base64.b64decode(part["image_url"]["url"].partition(",")[2])


def _token_ids(choice: Json) -> tuple[int, ...] | None:
    ids = choice.get("token_ids")
    return None if ids is None else tuple(ids)


def _completion_logprobs(logprobs: Json | None) -> CompletionLogprobs | None:
    if logprobs is None:
        return None
    return CompletionLogprobs(
        tokens=tuple(logprobs["tokens"]),
        token_logprobs=tuple(logprobs["token_logprobs"]),
        top_logprobs=tuple(logprobs["top_logprobs"]),
        text_offset=tuple(logprobs["text_offset"]),
    )


def _usage(usage: Json) -> Usage:
    prompt = usage.get("prompt_tokens_details") or {}
    completion = usage.get("completion_tokens_details") or {}
    return Usage(
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        image_tokens=completion.get("image_tokens", 0),
        cached_tokens=prompt.get("cached_tokens", 0),
    )


def _image_usage(usage: Json) -> Usage:
    output_tokens = usage["output_tokens"]
    details = usage.get("input_tokens_details") or {}
    return Usage(
        prompt_tokens=usage["input_tokens"],
        completion_tokens=output_tokens,
        image_tokens=output_tokens,
        cached_tokens=details.get("cached_tokens", 0),
    )
