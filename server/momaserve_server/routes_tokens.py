"""`POST /v1/tokenize` and `POST /v1/detokenize`: what the model reads, and what its tokens mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from momaserve.errors import PromptError
from momaserve.tokens.detokenize import ImageDone, ImageProgress, TextDelta
from momaserve.tokens.processor import Processor
from momaserve.tokens.prompt import ChatMessage
from momaserve_server import examples
from momaserve_server.body import read_body
from momaserve_server.context import ServerContext, context_of
from momaserve_server.logprobs import TokenNames
from momaserve_server.media import read_messages
from momaserve_server.openapi import TAKES_BODY, json_body
from momaserve_server.pictures import DATA_URL, png_base64
from momaserve_server.prompts import encode_text
from momaserve_server.schemas_tokens import DetokenizeRequest, TokenizeRequest

router = APIRouter()


@router.post(
    "/v1/tokenize",
    openapi_extra=json_body(
        TokenizeRequest, examples.TOKENIZE, examples.TOKENIZE_REPLY, statuses=TAKES_BODY
    ),
)
async def tokenize(request: Request) -> dict[str, Any]:
    context = context_of(request)
    body = await read_body(request, TokenizeRequest, context.workers)
    context.check_model(body.model)
    messages = None if body.messages is None else await read_messages(body.messages, context)
    return await context.workers.run(_tokenized, context, body, messages)


@router.post(
    "/v1/detokenize",
    openapi_extra=json_body(
        DetokenizeRequest, examples.DETOKENIZE, examples.DETOKENIZE_REPLY, statuses=TAKES_BODY
    ),
)
async def detokenize(request: Request) -> dict[str, Any]:
    context = context_of(request)
    body = await read_body(request, DetokenizeRequest, context.workers)
    context.check_model(body.model)
    return await context.workers.run(_detokenized, context, body.tokens)


def _tokenized(
    context: ServerContext, body: TokenizeRequest, messages: Sequence[ChatMessage] | None
) -> dict[str, Any]:
    engine = context.async_engine.engine
    processor, config = engine.processor, engine.model_config
    token_ids = _encode(processor, body, messages)
    names = TokenNames(processor.text)
    return {
        "tokens": token_ids,
        "count": len(token_ids),
        "max_model_len": engine.max_model_len,
        "modalities": [config.modality_of(token_id).label for token_id in token_ids],
        "image_spans": image_spans(processor, token_ids),
        "token_strs": [names.name(i) for i in token_ids] if body.return_token_strs else None,
    }


def _encode(
    processor: Processor, body: TokenizeRequest, messages: Sequence[ChatMessage] | None
) -> list[int]:
    if messages is not None:
        return list(processor.encode_chat(messages).token_ids)
    assert body.prompt is not None
    if body.add_special_tokens is not False:
        return list(encode_text(processor, body.prompt).token_ids)
    if processor.text is None:
        raise PromptError("this checkpoint has no tokenizer.json", param="prompt")
    return processor.text.encode(body.prompt)


def image_spans(processor: Processor, token_ids: Sequence[int]) -> list[dict[str, int]]:
    """Where the pictures of a well-formed prompt are; `end` is behind end_image."""
    spans: list[dict[str, int]] = []
    for index, token_id in enumerate(token_ids):
        if token_id == processor.spec.begin_image:
            spans.append({"start": index, "end": len(token_ids)})
        elif token_id == processor.spec.end_image:
            spans[-1]["end"] = index + 1
    return spans


def _detokenized(context: ServerContext, tokens: list[int]) -> dict[str, Any]:
    processor = context.async_engine.engine.processor
    limit = context.async_engine.engine.max_model_len
    if len(tokens) > limit:
        raise PromptError(
            f"tokens has {len(tokens)} ids; the model takes at most {limit}", param="tokens"
        )
    if tokens:
        try:
            processor.encode_ids(tokens)
        except PromptError as error:
            raise PromptError(str(error), param="tokens") from None
    decoder = processor.decoder()
    parts: list[dict[str, Any]] = []
    for event in [*decoder.push(tokens), *decoder.finish()]:
        if isinstance(event, TextDelta):
            _add_text(parts, event.text)
        elif processor.image is not None:
            parts.append(_picture(processor, event))
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    return {"prompt": text, "parts": parts}


def _add_text(parts: list[dict[str, Any]], text: str) -> None:
    if not text:
        return
    if parts and parts[-1]["type"] == "text":
        parts[-1]["text"] += text
    else:
        parts.append({"type": "text", "text": text})


def _picture(processor: Processor, event: ImageDone | ImageProgress) -> dict[str, Any]:
    is_whole = isinstance(event, ImageDone)
    image = (processor.render if is_whole else processor.render_partial)(event.token_ids)
    return {"type": "image_url", "image_url": {"url": DATA_URL + png_base64(image)}}
