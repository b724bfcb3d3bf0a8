"""`POST /v1/chat/completions`: messages in, text and pictures out, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from momaserve.sampling import OutputMode
from momaserve.tokens.detokenize import Event, ImageDone, ImageProgress, TextDelta
from momaserve_server import examples
from momaserve_server.body import read_body
from momaserve_server.context import ServerContext, context_of, request_id_of
from momaserve_server.generation import TOKENS_AT_ONCE, ChoiceDelta, Generation
from momaserve_server.logprobs import TokenNames, chat_logprobs
from momaserve_server.media import read_messages
from momaserve_server.openapi import GENERATES, json_body
from momaserve_server.pictures import DATA_URL, PartialSchedule, PictureRenderer, require_pixels
from momaserve_server.sampling_params import chat_params
from momaserve_server.schemas_chat import DEFAULT_PARTIAL_IMAGES, ChatRequest
from momaserve_server.sse import DONE, EventStreamResponse, encode_event, until_disconnect

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    openapi_extra=json_body(
        ChatRequest,
        examples.CHAT,
        examples.CHAT_REPLY,
        statuses=GENERATES,
        is_streamed=True,
    ),
)
async def create_chat_completion(request: Request) -> Response:
    context = context_of(request)
    context.check_accepting()
    body = await read_body(request, ChatRequest, context.workers)
    context.check_model(body.model)
    engine = context.async_engine.engine
    params = chat_params(body, engine, context.settings)
    if params.mode is not OutputMode.TEXT:
        require_pixels(engine.processor)
    messages = await read_messages(body.messages, context)
    prompt = await context.workers.run(engine.processor.encode_chat, messages)
    reply_id = f"chatcmpl-{request_id_of(request)}"
    generation = await Generation.start(
        context, [prompt], params, reply_id, tokens_at_once=1 if body.stream else TOKENS_AT_ONCE
    )
    reply = ChatReply(context, body, reply_id, generation, params.n)
    if body.stream:
        return EventStreamResponse(reply.stream(), generation.close)
    try:
        return JSONResponse(await until_disconnect(request.receive, reply.whole()))
    finally:
        generation.close()


class ChatReply:
    """Turns one generation into chunks or into one object."""

    def __init__(
        self,
        context: ServerContext,
        body: ChatRequest,
        reply_id: str,
        generation: Generation,
        num_choices: int,
    ) -> None:
        processor = context.async_engine.engine.processor
        self._body = body
        self._id = reply_id
        self._created_s = int(time.time())
        self._model = context.model_name
        self._generation = generation
        self._num_choices = num_choices
        self._names = TokenNames(processor.text)
        self._renderer = PictureRenderer(processor, context.workers)
        num_partial = body.partial_images
        self._schedules = [
            PartialSchedule(DEFAULT_PARTIAL_IMAGES if num_partial is None else num_partial)
            for _ in range(num_choices)
        ]

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Encoded chunks, [DONE] included."""
        for index in range(self._num_choices):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                extra = self._token_fields(delta)
                for event in delta.events:
                    content = await self._delta_of(delta.index, event)
                    if content is not None:
                        yield self._chunk(delta.index, content, extra)
                        extra = {}
                if extra:  # tokens whose text is held back, or a picture between two marks
                    yield self._chunk(delta.index, {}, extra)
                if delta.finish_reason is not None:
                    yield self._chunk(delta.index, {}, finish_reason=delta.finish_reason)
        if self._body.include_usage:
            usage = self._generation.counts.usage()
            yield encode_event(self._frame("chat.completion.chunk", [], usage))
        yield DONE

    async def whole(self) -> dict[str, Any]:
        """The chat completion object."""
        choices = [CollectedChoice() for _ in range(self._num_choices)]
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                await choices[delta.index].add(delta, self._renderer)
        self._generation.require_answer()
        replies = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.content()},
                "logprobs": chat_logprobs(choice.logprobs, self._names)
                if self._body.logprobs
                else None,
                "finish_reason": choice.finish_reason,
                **({"token_ids": choice.token_ids} if self._body.return_token_ids else {}),
                **({"routing": choice.routing} if self._body.include_routing else {}),
            }
            for index, choice in enumerate(choices)
        ]
        return self._frame("chat.completion", replies, self._generation.counts.usage())

    def _frame(
        self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        frame: dict[str, Any] = {
            "id": self._id,
            "object": kind,
            "created": self._created_s,
            "model": self._model,
            "choices": choices,
        }
        if kind == "chat.completion" or self._body.include_usage:
            frame["usage"] = usage
        return frame

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        extra: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, **(extra or {})}
        choice["finish_reason"] = finish_reason
        return encode_event(self._frame("chat.completion.chunk", [choice], None))

    def _token_fields(self, delta: ChoiceDelta) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._body.logprobs and delta.logprobs:
            fields["logprobs"] = chat_logprobs(delta.logprobs, self._names)
        if self._body.return_token_ids and delta.token_ids:
            fields["token_ids"] = list(delta.token_ids)
        if delta.routing:
            fields["routing"] = delta.routing
        return fields

    async def _delta_of(self, choice: int, event: Event) -> dict[str, Any] | None:
        """`delta` of a chunk; None when there is nothing to show yet."""
        if isinstance(event, TextDelta):
            return {"content": event.text} if event.text else None
        if isinstance(event, ImageDone):
            done = total = len(event.token_ids)
            picture = await self._renderer.whole(event.token_ids)
        elif self._schedules[choice].is_due(event.index, event.num_tokens, event.total):
            done, total = event.num_tokens, event.total
            picture = await self._renderer.partial(event.token_ids)
        else:
            return None
        return {
            "image": {
                "index": event.index,
                "tokens_done": done,
                "tokens_total": total,
                "b64_json": picture,
            }
        }


class CollectedChoice:
    """A choice of a reply that is returned whole."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []
        self.routing: list[dict[str, Any]] = []
        self.finish_reason: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._has_image = False

    async def add(self, delta: ChoiceDelta, renderer: PictureRenderer) -> None:
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.routing += delta.routing
        self.finish_reason = delta.finish_reason
        for event in delta.events:
            if isinstance(event, TextDelta):
                self._add_text(event.text)
            elif isinstance(event, ImageDone):
                url = DATA_URL + await renderer.whole(event.token_ids)
                self._parts.append({"type": "image_url", "image_url": {"url": url}})
                self._has_image = True
            else:
                assert isinstance(event, ImageProgress)  # shown in streams only

    def content(self) -> str | list[dict[str, Any]]:
        """A string while there is only text, else the parts in order."""
        if self._has_image:
            return self._parts
        return self._parts[0]["text"] if self._parts else ""

    def _add_text(self, text: str) -> None:
        if not text:
            return
        if self._parts and self._parts[-1]["type"] == "text":
            self._parts[-1]["text"] += text
        else:
            self._parts.append({"type": "text", "text": text})
