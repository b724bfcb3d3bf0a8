"""Every call of the API: its request, and how to read what comes back. Pure functions.

Both clients have one method for each of these, with the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from momaserve_client import events, replies, requests
from momaserve_client.errors import ApiError
from momaserve_client.events import EventReader
from momaserve_client.fields import Json
from momaserve_client.options import CallOptions, ImageOptions, Options
from momaserve_client.requests import ApiRequest, ChatInput, Prompt
from momaserve_client.types import (
    AbortReply,
    ChatEvent,
    ChatReply,
    CompletionEvent,
    CompletionReply,
    DetokenizeReply,
    Health,
    ImageChunk,
    ImagesReply,
    Model,
    Router,
    TokenizeReply,
    Version,
)

Parsed = TypeVar("Parsed")
Event = TypeVar("Event")


@dataclass(frozen=True, slots=True)
class Call(Generic[Parsed]):
    """A call whose answer comes whole."""

    request: ApiRequest
    parse: Callable[[Json, str | None], Parsed]
    """From the reply's JSON and its request id."""
    is_probe: bool = False
    """Asks how things are now, so waiting and asking again would miss the point."""


@dataclass(frozen=True, slots=True)
class StreamCall(Generic[Event]):
    """A call whose answer comes event by event."""

    request: ApiRequest
    parse: Callable[[Json], Iterator[Event]]
    num_images: int | None = None
    """Whole pictures that end the stream; None for one that ends with [DONE]."""

    def reader(self) -> EventReader[Event]:
        return EventReader(self.parse, num_images=self.num_images)


def chat(
    chat: ChatInput,
    options: Options,
    *,
    modalities: Sequence[str] | None,
    top_logprobs: int | None,
) -> Call[ChatReply]:
    request = requests.chat_request(chat, options, modalities=modalities, top_logprobs=top_logprobs)
    return Call(request, replies.chat_reply)


def stream_chat(
    chat: ChatInput,
    options: Options,
    *,
    modalities: Sequence[str] | None,
    top_logprobs: int | None,
    partial_images: int | None,
) -> StreamCall[ChatEvent]:
    request = requests.chat_request(
        chat,
        options,
        modalities=modalities,
        top_logprobs=top_logprobs,
        partial_images=partial_images,
        stream=True,
    )
    return StreamCall(request, events.chat_events)


def complete(
    prompt: Prompt, options: Options, *, echo: bool, logprobs: int | None
) -> Call[CompletionReply]:
    request = requests.completion_request(prompt, options, echo=echo, logprobs=logprobs)
    return Call(request, replies.completion_reply)


def stream_complete(
    prompt: Prompt, options: Options, *, echo: bool, logprobs: int | None
) -> StreamCall[CompletionEvent]:
    request = requests.completion_request(
        prompt, options, echo=echo, logprobs=logprobs, stream=True
    )
    return StreamCall(request, events.completion_events)


def generate_images(prompt: str, options: ImageOptions, *, size: str | None) -> Call[ImagesReply]:
    return Call(requests.images_request(prompt, options, size=size), replies.images_reply)


def stream_images(
    prompt: str, options: ImageOptions, *, size: str | None, partial_images: int
) -> StreamCall[ImageChunk]:
    request = requests.images_request(prompt, options, size=size, partial_images=partial_images)
    return StreamCall(request, events.image_events, options.get("n") or 1)


def edit_images(
    image: bytes,
    prompt: str,
    options: ImageOptions,
    *,
    mask: bytes | None,
    keep_rows: int | None,
    size: str | None,
) -> Call[ImagesReply]:
    request = requests.edit_request(
        image, prompt, options, mask=mask, keep_rows=keep_rows, size=size
    )
    return Call(request, replies.images_reply)


def stream_edits(
    image: bytes,
    prompt: str,
    options: ImageOptions,
    *,
    mask: bytes | None,
    keep_rows: int | None,
    size: str | None,
    partial_images: int,
) -> StreamCall[ImageChunk]:
    request = requests.edit_request(
        image,
        prompt,
        options,
        mask=mask,
        keep_rows=keep_rows,
        size=size,
        partial_images=partial_images,
    )
    return StreamCall(request, events.image_events, options.get("n") or 1)


def tokenize(
    prompt: str | None,
    messages: ChatInput | None,
    options: CallOptions,
    *,
    model: str | None,
    add_special_tokens: bool,
    return_token_strs: bool,
) -> Call[TokenizeReply]:
    request = requests.tokenize_request(
        prompt,
        messages,
        options,
        model=model,
        add_special_tokens=add_special_tokens,
        return_token_strs=return_token_strs,
    )
    return Call(request, replies.tokenize_reply)


def detokenize(
    tokens: Sequence[int], options: CallOptions, *, model: str | None
) -> Call[DetokenizeReply]:
    request = requests.detokenize_request(tokens, options, model=model)
    return Call(request, replies.detokenize_reply)


def abort(request_id: str, options: CallOptions) -> Call[AbortReply]:
    return Call(requests.abort_request(request_id, options), replies.abort_reply)


def models(options: CallOptions) -> Call[list[Model]]:
    return Call(requests.get_request("/v1/models", options), replies.models)


def version(options: CallOptions) -> Call[Version]:
    return Call(requests.get_request("/version", options), replies.version)


def router(options: CallOptions) -> Call[Router]:
    return Call(requests.get_request("/v1/router", options), replies.router)


def probes(options: CallOptions) -> tuple[Call[None], Call[None]]:
    """`/health` and `/ready`; only their status matters."""
    health, ready = (
        Call(requests.get_request(path, options), lambda payload, request_id: None, is_probe=True)
        for path in ("/health", "/ready")
    )
    return health, ready


def refusal(error: ApiError) -> str:
    """The reason that a probe's 5xx gives. Raises `error` again if it is none."""
    if error.status is None or error.status < 500:
        raise error
    return error.code or f"status {error.status}"


def health(unhealthy: str | None, unready: str | None) -> Health:
    """From the refusals of both probes."""
    return Health(
        is_healthy=unhealthy is None, is_ready=unready is None, reason=unhealthy or unready
    )
