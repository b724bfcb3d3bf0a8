"""Reads whole replies: pure functions from JSON to the objects of `types`.

Each takes the reply's JSON and its request id, and raises KeyError, TypeError or ValueError for
JSON that is not the reply; `expected` makes one BadReplyError of them all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from momaserve_client.errors import BadReplyError
from momaserve_client.fields import (
    Json,
    as_count,
    as_list,
    as_number,
    as_object,
    as_png,
    as_text,
    many,
    maybe,
)
from momaserve_client.images import Png
from momaserve_client.types import (
    AbortReply,
    ChatChoice,
    ChatReply,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    DepthLayer,
    DetokenizeReply,
    ImageSpan,
    ImagesReply,
    Model,
    Router,
    RouterGroup,
    RouterLayer,
    TokenizeReply,
    TokenRouting,
    Usage,
    Version,
)

Parsed = TypeVar("Parsed")
MAX_SHOWN_BYTES = 80
UNEXPECTED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading JSON that is something else raises."""


@contextmanager
def expected(body: bytes) -> Iterator[None]:
    """Raises BadReplyError when `body` is not what the code inside expects."""
    try:
        yield
    except UNEXPECTED as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        start = body[:MAX_SHOWN_BYTES].decode("utf-8", "replace")
        raise BadReplyError(f"unexpected reply: {reason} (it begins {start!r})") from error


def parsed(body: bytes, parse: Callable[[Json], Parsed]) -> Parsed:
    """`parse` of a JSON body. Raises BadReplyError when it is not what was expected."""
    with expected(body):
        return parse(as_object(json.loads(body)))


def chat_reply(payload: Json, request_id: str | None) -> ChatReply:
    return ChatReply(
        id=as_text(payload["id"]),
        model=as_text(payload["model"]),
        choices=_some(many(payload["choices"], _chat_choice)),
        usage=usage(payload["usage"]),
        request_id=request_id,
    )


def completion_reply(payload: Json, request_id: str | None) -> CompletionReply:
    return CompletionReply(
        id=as_text(payload["id"]),
        model=as_text(payload["model"]),
        choices=_some(many(payload["choices"], _completion_choice)),
        usage=usage(payload["usage"]),
        request_id=request_id,
    )


def images_reply(payload: Json, request_id: str | None) -> ImagesReply:
    return ImagesReply(
        images=many(payload["data"], lambda item: as_png(item["b64_json"])),
        usage=image_usage(payload["usage"]),
        request_id=request_id,
    )


def tokenize_reply(payload: Json, request_id: str | None) -> TokenizeReply:
    return TokenizeReply(
        tokens=many(payload["tokens"], as_count),
        max_model_len=as_count(payload["max_model_len"]),
        modalities=many(payload["modalities"], as_text),
        image_spans=many(
            payload["image_spans"],
            lambda span: ImageSpan(start=as_count(span["start"]), end=as_count(span["end"])),
        ),
        token_strs=maybe(payload.get("token_strs"), lambda strs: many(strs, as_text)),
        request_id=request_id,
    )


def detokenize_reply(payload: Json, request_id: str | None) -> DetokenizeReply:
    return DetokenizeReply(
        text=as_text(payload["prompt"]),
        parts=many(payload["parts"], _part),
        request_id=request_id,
    )


def abort_reply(payload: Json, request_id: str | None) -> AbortReply:
    return AbortReply(id=as_text(payload["id"]), request_id=request_id)


def models(payload: Json, request_id: str | None) -> list[Model]:
    return [
        Model(
            id=as_text(item["id"]),
            max_model_len=as_count(item["max_model_len"]),
            modalities=many(item["modalities"], as_text),
            raw=item,
            request_id=request_id,
        )
        for item in map(as_object, as_list(payload["data"]))
    ]


def version(payload: Json, request_id: str | None) -> Version:
    return Version(
        version=as_text(payload["version"]),
        model=as_text(payload["model"]),
        request_id=request_id,
    )


def router(payload: Json, request_id: str | None) -> Router:
    return Router(
        routing=as_text(payload["routing"]),
        prompt_routing=as_text(payload["prompt_routing"]),
        num_steps=as_count(payload["num_steps"]),
        groups=many(payload["groups"], _router_group),
        depth=many(
            payload["depth"],
            lambda item: DepthLayer(
                layer=as_count(item["layer"]),
                taken=as_count(item["taken"]),
                skipped=as_count(item["skipped"]),
            ),
        ),
        request_id=request_id,
    )


def _router_group(group: Json) -> RouterGroup:
    return RouterGroup(
        name=as_text(group["name"]),
        modalities=many(group["modalities"], as_text),
        num_experts=as_count(group["num_experts"]),
        num_tokens=as_count(group["num_tokens"]),
        mean_experts_per_token=maybe(group["mean_experts_per_token"], as_number),
        experts_per_token=many(group["experts_per_token"], as_count),
        layers=many(group["layers"], _router_layer),
    )


def _router_layer(layer: Json) -> RouterLayer:
    return RouterLayer(
        layer=as_count(layer["layer"]),
        expert_tokens=many(layer["expert_tokens"], as_count),
        load=maybe(layer["load"], lambda shares: many(shares, as_number)),
        mean_experts_per_token=maybe(layer["mean_experts_per_token"], as_number),
    )


def _some(choices: tuple[Parsed, ...]) -> tuple[Parsed, ...]:
    if not choices:
        raise ValueError("no choices")
    return choices


def _chat_choice(choice: Json) -> ChatChoice:
    content = choice["message"]["content"]
    return ChatChoice(
        index=as_count(choice["index"]),
        parts=(content,) if isinstance(content, str) else many(content or [], _part),
        finish_reason=maybe(choice["finish_reason"], as_text),
        token_ids=maybe(choice.get("token_ids"), lambda ids: many(ids, as_count)),
        logprobs=maybe(choice.get("logprobs"), as_object),
        routing=maybe(choice.get("routing"), routing),
    )


def _completion_choice(choice: Json) -> CompletionChoice:
    return CompletionChoice(
        index=as_count(choice["index"]),
        text=as_text(choice["text"]),
        finish_reason=maybe(choice["finish_reason"], as_text),
        token_ids=maybe(choice.get("token_ids"), lambda ids: many(ids, as_count)),
        logprobs=maybe(choice.get("logprobs"), completion_logprobs),
        routing=maybe(choice.get("routing"), routing),
    )


def _part(part: Json) -> str | Png:
    if part["type"] == "text":
        return as_text(part["text"])
    return as_png(as_text(part["image_url"]["url"]).partition(",")[2])


def routing(entries: Any) -> tuple[TokenRouting, ...]:
    """`routing` of a choice or of a chunk's choice."""
    return many(
        entries,
        lambda entry: TokenRouting(
            token_id=as_count(entry["token_id"]),
            group=as_text(entry["group"]),
            experts=maybe(entry["experts"], lambda layers: many(layers, _experts)),
        ),
    )


def _experts(layer: Any) -> tuple[int, ...] | None:
    return maybe(layer, lambda experts: many(experts, as_count))


def completion_logprobs(logprobs: Json) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=many(logprobs["tokens"], as_text),
        token_logprobs=many(logprobs["token_logprobs"], lambda item: maybe(item, as_number)),
        top_logprobs=many(logprobs["top_logprobs"], lambda item: maybe(item, as_object)),
        text_offset=many(logprobs["text_offset"], as_count),
    )


def usage(payload: Json) -> Usage:
    """Of the text routes."""
    prompt = payload.get("prompt_tokens_details") or {}
    completion = payload.get("completion_tokens_details") or {}
    return Usage(
        prompt_tokens=as_count(payload["prompt_tokens"]),
        completion_tokens=as_count(payload["completion_tokens"]),
        image_tokens=as_count(completion.get("image_tokens", 0)),
        cached_tokens=as_count(prompt.get("cached_tokens", 0)),
    )


def image_usage(payload: Json) -> Usage:
    """Of the images routes."""
    output_tokens = as_count(payload["output_tokens"])
    details = payload.get("input_tokens_details") or {}
    return Usage(
        prompt_tokens=as_count(payload["input_tokens"]),
        completion_tokens=output_tokens,
        image_tokens=output_tokens,
        cached_tokens=as_count(details.get("cached_tokens", 0)),
    )
