"""Builds requests: pure functions from arguments to method, path and body."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from momaserve_client.images import media_type
from momaserve_client.options import CallOptions, ImageOptions, Options, without_call_options
from momaserve_client.timeouts import Timeouts

Part = Mapping[str, Any]
"""One content part of a message, as OpenAI writes them."""
Message = Mapping[str, Any]
"""{"role": ..., "content": text or parts}; `message` makes them."""
ChatInput = str | bytes | Sequence[str | bytes | Part | Message]
"""A text, parts of one user message (texts, picture files, `picture(...)`), or whole messages."""
Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiRequest:
    method: str
    path: str
    body: Mapping[str, Any] | None = None
    """Sent as JSON."""
    form: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    """With `form`, sent as multipart/form-data."""
    request_id: str | None = None
    timeouts: Timeouts | None = None


def picture(data: bytes) -> Part:
    """A picture (PNG, JPEG, WebP, GIF or BMP file) as a content part."""
    kind = media_type(data) or "image/*"
    url = f"data:{kind};base64," + base64.b64encode(data).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}


def message(role: str, *parts: str | bytes | Part) -> Message:
    """A message: "system", "user" or "assistant" and what was said, texts and picture files.

    `message("assistant", *reply.parts)` puts an answer into the next request.
    """
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": role, "content": parts[0]}
    return {"role": role, "content": [_part(part) for part in parts]}


def _part(part: str | bytes | Part) -> Part:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return picture(part) if isinstance(part, bytes) else part


def chat_messages(chat: ChatInput) -> list[Message]:
    """The messages that `chat` stands for. Raises ValueError for a mix of messages and parts."""
    if isinstance(chat, str | bytes):
        return [message("user", chat)]
    messages = [item for item in chat if isinstance(item, Mapping) and "role" in item]
    if len(messages) == len(chat):
        return messages
    if messages:
        raise ValueError("give whole messages or the parts of one, not both")
    return [message("user", *chat)]


def chat_request(
    chat: ChatInput,
    options: Options,
    *,
    modalities: Sequence[str] | None,
    top_logprobs: int | None,
    partial_images: int | None = None,
    stream: bool = False,
) -> ApiRequest:
    body = {"messages": chat_messages(chat), **without_call_options(options)}
    if modalities is not None:
        body["modalities"] = list(modalities)
    if top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": top_logprobs}
    if partial_images is not None:
        body["partial_images"] = partial_images
    return _post("/v1/chat/completions", body | _stream_fields(stream), options)


def completion_request(
    prompt: Prompt, options: Options, *, echo: bool, logprobs: int | None, stream: bool = False
) -> ApiRequest:
    body = {"prompt": prompt, "echo": echo, **without_call_options(options)}
    if logprobs is not None:
        body["logprobs"] = logprobs
    return _post("/v1/completions", body | _stream_fields(stream), options)


def images_request(
    prompt: str,
    options: ImageOptions,
    *,
    size: str | None,
    partial_images: int | None = None,
) -> ApiRequest:
    """Streams if `partial_images` is given."""
    fields = _image_fields(prompt, options, size, partial_images)
    return _post("/v1/images/generations", fields, options)


def edit_request(
    image: bytes,
    prompt: str,
    options: ImageOptions,
    *,
    mask: bytes | None,
    keep_rows: int | None,
    size: str | None,
    partial_images: int | None = None,
) -> ApiRequest:
    """A form, as OpenAI's SDK sends it. Streams if `partial_images` is given."""
    fields = _image_fields(prompt, options, size, partial_images)
    if keep_rows is not None:
        fields["keep_rows"] = keep_rows
    return ApiRequest(
        method="POST",
        path="/v1/images/edits",
        form={name: _form_value(value) for name, value in fields.items()},
        files={"image": image} if mask is None else {"image": image, "mask": mask},
        request_id=options.get("request_id"),
        timeouts=options.get("timeouts"),
    )


def tokenize_request(
    prompt: str | None,
    messages: ChatInput | None,
    options: CallOptions,
    *,
    model: str | None,
    add_special_tokens: bool,
    return_token_strs: bool,
) -> ApiRequest:
    """Raises ValueError unless exactly one of `prompt` and `messages` is given."""
    if (prompt is None) == (messages is None):
        raise ValueError("give either prompt or messages")
    body: dict[str, Any] = {
        "add_special_tokens": add_special_tokens,
        "return_token_strs": return_token_strs,
    }
    if model is not None:
        body["model"] = model
    if messages is None:
        body["prompt"] = prompt
    else:
        body["messages"] = chat_messages(messages)
    return _post("/v1/tokenize", body, options)


def detokenize_request(
    tokens: Sequence[int], options: CallOptions, *, model: str | None
) -> ApiRequest:
    body: dict[str, Any] = {"tokens": list(tokens)}
    if model is not None:
        body["model"] = model
    return _post("/v1/detokenize", body, options)


def abort_request(request_id: str, options: CallOptions) -> ApiRequest:
    """Raises ValueError for what can be no id."""
    path = f"/v1/requests/{quote(checked_request_id(request_id), safe='')}"
    return _call("DELETE", path, options)


def get_request(path: str, options: CallOptions) -> ApiRequest:
    return _call("GET", path, options)


def checked_request_id(request_id: str) -> str:
    """Raises ValueError for an id that no server takes."""
    if not REQUEST_ID.fullmatch(request_id) or request_id in (".", ".."):
        raise ValueError(
            f"a request id is 1 to 128 characters of [A-Za-z0-9._:-], got {request_id!r}"
        )
    return request_id


def _call(method: str, path: str, options: CallOptions) -> ApiRequest:
    return ApiRequest(
        method=method,
        path=path,
        request_id=options.get("request_id"),
        timeouts=options.get("timeouts"),
    )


def _post(path: str, body: Mapping[str, Any], options: CallOptions) -> ApiRequest:
    return ApiRequest(
        method="POST",
        path=path,
        body=body,
        request_id=options.get("request_id"),
        timeouts=options.get("timeouts"),
    )


def _image_fields(
    prompt: str, options: ImageOptions, size: str | None, partial_images: int | None
) -> dict[str, Any]:
    fields = {"prompt": prompt, "response_format": "b64_json", **without_call_options(options)}
    if size is not None:
        fields["size"] = size
    if partial_images is not None:
        fields |= {"stream": True, "partial_images": partial_images}
    return fields


def _form_value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _stream_fields(stream: bool) -> dict[str, Any]:
    return {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
