"""`POST /v1/completions`: text or token ids in, text out; also scores prompts (`echo`)."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from momaserve.errors import PromptError
from momaserve.outputs import TokenLogprob
from momaserve.tokens.detokenize import TextDelta
from momaserve.tokens.processor import Processor
from momaserve.tokens.prompt import Prompt
from momaserve_server import examples
from momaserve_server.body import read_body
from momaserve_server.context import ServerContext, context_of, request_id_of
from momaserve_server.generation import TOKENS_AT_ONCE, ChoiceDelta, Generation
from momaserve_server.logprobs import TextOffsets, TokenNames, completion_logprobs
from momaserve_server.openapi import GENERATES, json_body
from momaserve_server.prompts import encode_text
from momaserve_server.sampling_params import completion_params
from momaserve_server.schemas_completions import CompletionRequest
from momaserve_server.sse import DONE, EventStreamResponse, encode_event, until_disconnect

router = APIRouter()


@router.post(
    "/v1/completions",
    openapi_extra=json_body(
        CompletionRequest,
        examples.COMPLETION,
        examples.COMPLETION_REPLY,
        statuses=GENERATES,
        is_streamed=True,
    ),
)
async def create_completion(request: Request) -> Response:
    context = context_of(request)
    context.check_accepting()
    body = await read_body(request, CompletionRequest, context.workers)
    context.check_model(body.model)
    engine = context.async_engine.engine
    params = completion_params(body, engine, context.settings)
    given = body.prompts()
    limit = context.settings.max_prompts_per_request
    if len(given) > limit:
        raise PromptError(
            f"the request has {len(given)} prompts; the limit is {limit}", param="prompt"
        )
    prompts = await context.workers.run(_encode, engine.processor, given)
    reply_id = f"cmpl-{request_id_of(request)}"
    generation = await Generation.start(
        context, prompts, params, reply_id, tokens_at_once=1 if body.stream else TOKENS_AT_ONCE
    )
    choices = [
        CompletionChoice(body, engine.processor, source, prompt)
        for source, prompt in zip(given, prompts, strict=True)
        for _ in range(params.n)
    ]
    reply = CompletionReply(context, body, reply_id, generation, choices)
    if body.stream:
        return EventStreamResponse(reply.stream(), generation.close)
    try:
        return JSONResponse(await until_disconnect(request.receive, reply.whole()))
    finally:
        generation.close()


def _encode(processor: Processor, given: Sequence[str | list[int]]) -> list[Prompt]:
    return [
        encode_text(processor, item) if isinstance(item, str) else processor.encode_ids(item)
        for item in given
    ]


class CompletionChoice:
    """What one choice still has to say: its echo first, then each delta."""

    def __init__(
        self,
        body: CompletionRequest,
        processor: Processor,
        source: str | list[int],
        prompt: Prompt,
    ) -> None:
        self._body = body
        self._prompt = prompt
        self._names = TokenNames(processor.text)
        self._tokenizer = processor.text
        decoded = ""
        if body.echo and processor.text is not None:
            decoded = processor.text.decode(prompt.token_ids)
        self._echo = (source if isinstance(source, str) else decoded) if body.echo else ""
        # The template may put text around a text prompt; offsets count in what is returned.
        self._skipped = max(0, decoded.find(self._echo))
        self._offsets = TextOffsets(processor.text, start=len(self._echo))
        self._is_first = True

    def take(self, delta: ChoiceDelta) -> dict[str, Any]:
        """Text, logprobs and token ids that `delta` adds to the choice."""
        text = "".join(event.text for event in delta.events if isinstance(event, TextDelta))
        token_ids = list(delta.token_ids)
        wants_logprobs = self._body.logprobs is not None
        offsets = self._offsets.push(token_ids) if wants_logprobs else []
        entries: list[TokenLogprob | None] = list(delta.logprobs or ())
        if self._is_first and self._body.echo:
            text = self._echo + text
            token_ids = [*self._prompt.token_ids, *token_ids]
            offsets = self._prompt_offsets() + offsets
            entries = [None, *(delta.prompt_logprobs or ()), *entries]
        self._is_first = False
        fields: dict[str, Any] = {"text": text, "logprobs": None}
        is_scored = len(entries) == len(token_ids)  # not if time was up before the prompt was
        if wants_logprobs and token_ids and is_scored:
            fields["logprobs"] = completion_logprobs(token_ids, entries, offsets, self._names)
        if self._body.return_token_ids:
            fields["token_ids"] = token_ids
        if self._body.include_routing:
            fields["routing"] = list(delta.routing)
        return fields

    def _prompt_offsets(self) -> list[int]:
        raw = TextOffsets(self._tokenizer).push(self._prompt.token_ids)
        return [min(max(0, offset - self._skipped), len(self._echo)) for offset in raw]


class CompletionReply:
    """Turns one generation into chunks or into one object."""

    def __init__(
        self,
        context: ServerContext,
        body: CompletionRequest,
        reply_id: str,
        generation: Generation,
        choices: Sequence[CompletionChoice],
    ) -> None:
        self._body = body
        self._id = reply_id
        self._created_s = int(time.time())
        self._model = context.model_name
        self._generation = generation
        self._choices = choices

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Encoded chunks, [DONE] included."""
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                fields = self._choices[delta.index].take(delta)
                if not (any(fields.values()) or delta.finish_reason):
                    continue
                choice = {"index": delta.index, **fields, "finish_reason": delta.finish_reason}
                yield encode_event(self._frame([choice], None))
        if self._body.include_usage:
            yield encode_event(self._frame([], self._generation.counts.usage()))
        yield DONE

    async def whole(self) -> dict[str, Any]:
        """The completion object: the chunks, put together."""
        replies: list[dict[str, Any]] = [
            {"index": index, "text": "", "logprobs": None} for index in range(len(self._choices))
        ]
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                reply = replies[delta.index]
                _extend(reply, self._choices[delta.index].take(delta))
                reply["finish_reason"] = delta.finish_reason
        self._generation.require_answer()
        return self._frame(replies, self._generation.counts.usage())

    def _frame(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        frame: dict[str, Any] = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created_s,
            "model": self._model,
            "choices": choices,
        }
        if not self._body.stream or self._body.include_usage:
            frame["usage"] = usage
        return frame


def _extend(reply: dict[str, Any], fields: dict[str, Any]) -> None:
    reply["text"] += fields["text"]
    if "token_ids" in fields:
        reply.setdefault("token_ids", []).extend(fields["token_ids"])
    if "routing" in fields:
        reply.setdefault("routing", []).extend(fields["routing"])
    logprobs = fields["logprobs"]
    if logprobs is not None and reply["logprobs"] is None:
        reply["logprobs"] = logprobs
    elif logprobs is not None:
        for name, values in logprobs.items():
            reply["logprobs"][name].extend(values)
