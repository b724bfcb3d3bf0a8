"""Builds requests: pure functions from arguments to method, path and JSON body."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict


class ImageOptions(TypedDict, total=False):
    """Request fields that every route knows which generates; see the server's table."""

    model: str
    n: int
    seed: int
    image_temperature: float
    image_top_k: int
    image_top_p: float
    guidance_scale: float
    min_tokens: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    priority: int
    cache_salt: str
    timeout_s: float
    routing: str
    prompt_routing: str


class Options(ImageOptions, total=False):
    """Those of the routes that generate text."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    max_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logit_bias: Mapping[int, float]
    return_token_ids: bool


Part = Mapping[str, Any]
"""One content part of a message, as OpenAI writes them."""
Message = Mapping[str, Any]
"""{"role": ..., "content": text or parts}."""
ChatInput = str | Sequence[str | Part | Message]
"""A text, parts of one user message (texts and `picture(...)`), or whole messages."""


@dataclass(frozen=True, slots=True)
class ApiRequest:
    method: str
    path: str
    body: Mapping[str, Any] | None = None


def picture(data: bytes) -> Part:
    """A picture (PNG, JPEG, WebP, GIF or BMP file) as a content part."""
    url = "data:image/*;base64," + base64.b64encode(data).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}


def chat_messages(chat: ChatInput) -> list[Message]:
    """The messages that `chat` stands for."""
    if isinstance(chat, str):
        return [{"role": "user", "content": chat}]
    messages = [item for item in chat if not isinstance(item, str) and "role" in item]
    if len(messages) == len(chat):
        return messages
    if messages:
        raise ValueError("give whole messages or the parts of one, not both")
    parts = [{"type": "text", "text": item} if isinstance(item, str) else item for item in chat]
    return [{"role": "user", "content": parts}]


def chat_request(
    chat: ChatInput,
    options: Options,
    *,
    modalities: Sequence[str] | None,
    top_logprobs: int | None,
    partial_images: int | None = None,
    stream: bool,
) -> ApiRequest:
    body: dict[str, Any] = {"messages": chat_messages(chat), **options}
    if modalities is not None:
        body["modalities"] = list(modalities)
    if top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": top_logprobs}
    if partial_images is not None:
        body["partial_images"] = partial_images
    return ApiRequest("POST", "/v1/chat/completions", body | _stream_fields(stream))


def completion_request(
    prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
    options: Options,
    *,
    echo: bool,
    logprobs: int | None,
    stream: bool,
) -> ApiRequest:
    body: dict[str, Any] = {"prompt": prompt, "echo": echo, **options}
    if logprobs is not None:
        body["logprobs"] = logprobs
    return ApiRequest("POST", "/v1/completions", body | _stream_fields(stream))


def images_request(
    prompt: str, options: ImageOptions, *, partial_images: int | None, stream: bool
) -> ApiRequest:
    body: dict[str, Any] = {"prompt": prompt, "response_format": "b64_json", **options}
    if stream:
        body |= {"stream": True, "partial_images": partial_images or 0}
    return ApiRequest("POST", "/v1/images/generations", body)


MODELS = ApiRequest("GET", "/v1/models")
HEALTH = ApiRequest("GET", "/health")
READY = ApiRequest("GET", "/ready")


def _stream_fields(stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
