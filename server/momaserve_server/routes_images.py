"""`POST /v1/images/generations`: OpenAI's picture route, whole or growing."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from momaserve.errors import DeadlineError, SamplingError
from momaserve.sampling import SamplingParams
from momaserve.tokens.detokenize import ImageDone, ImageProgress
from momaserve.tokens.processor import Processor
from momaserve.tokens.prompt import Prompt
from momaserve_server import examples
from momaserve_server.body import read_body
from momaserve_server.context import ServerContext, context_of, request_id_of
from momaserve_server.generation import TOKENS_AT_ONCE, Generation, TokenCounts
from momaserve_server.openapi import GENERATES, json_body
from momaserve_server.pictures import PartialSchedule, PictureRenderer, require_pixels
from momaserve_server.prompts import encode_text
from momaserve_server.sampling_params import image_params
from momaserve_server.schemas_images import ImageRequest
from momaserve_server.sse import EventStreamResponse, encode_event, until_disconnect

router = APIRouter()

_LOOKS = 4
"""At a picture, between two states of it that are shown."""


@router.post(
    "/v1/images/generations",
    openapi_extra=json_body(
        ImageRequest,
        examples.IMAGE,
        examples.IMAGE_REPLY,
        statuses=GENERATES,
        is_streamed=True,
    ),
)
async def create_image(request: Request) -> Response:
    context = context_of(request)
    context.check_accepting()
    body = await read_body(request, ImageRequest, context.workers)
    context.check_model(body.model)
    engine = context.async_engine.engine
    params = image_params(body, engine, context.settings)
    size = checked_size(body.size, engine.processor)
    prompt = await context.workers.run(encode_text, engine.processor, body.prompt)
    generation = await start_drawing(context, request, body, prompt, params)
    reply = ImageReply(context, body, generation, params.n, size)
    if body.stream:
        return EventStreamResponse(reply.stream(), generation.close)
    try:
        return JSONResponse(await until_disconnect(request.receive, reply.whole()))
    finally:
        generation.close()


def checked_size(asked: str | None, processor: Processor) -> str:
    """The model's one picture size, as "64x64".

    Raises:
        SamplingError: the model makes no pictures, or none of the size asked for.
    """
    side = require_pixels(processor).image_size
    size = f"{side}x{side}"
    if asked not in (None, "auto", size):
        raise SamplingError(f"size must be 'auto' or {size!r}, got {asked!r}", param="size")
    return size


def tokens_at_once(context: ServerContext, body: ImageRequest) -> int:
    """How often a reply looks at growing pictures: a few times between two that it shows."""
    total = context.async_engine.engine.processor.spec.tokens_per_image
    if not body.partial_images or total is None:
        return TOKENS_AT_ONCE
    return min(TOKENS_AT_ONCE, max(1, total // (_LOOKS * (body.partial_images + 1))))


async def start_drawing(
    context: ServerContext,
    request: Request,
    body: ImageRequest,
    prompt: Prompt,
    params: SamplingParams,
) -> Generation:
    """As `Generation.start`."""
    return await Generation.start(
        context,
        [prompt],
        params,
        f"img-{request_id_of(request)}",
        tokens_at_once=tokens_at_once(context, body),
    )


class ImageReply:
    """Turns one generation into events or into one object."""

    def __init__(
        self,
        context: ServerContext,
        body: ImageRequest,
        generation: Generation,
        num_images: int,
        size: str,
        kind: str = "image_generation",
    ) -> None:
        """
        Args:
            kind: what its events are called.
        """
        processor = context.async_engine.engine.processor
        self._created_s = int(time.time())
        self._generation = generation
        self._num_images = num_images
        self._renderer = PictureRenderer(processor, context.workers)
        self._kind = kind
        self._num_partial = body.partial_images or 0
        self._format = {
            "size": size,
            "quality": "auto",
            "background": "opaque",
            "output_format": "png",
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """OpenAI's event names; like OpenAI's, this stream has no [DONE] unless it fails."""
        schedules = [PartialSchedule(self._num_partial) for _ in range(self._num_images)]
        shown = [0] * self._num_images
        num_whole = 0
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                index = delta.index
                for event in delta.events:
                    if isinstance(event, ImageDone):
                        png = await self._renderer.whole(event.token_ids)
                        usage = _usage(self._generation.counts, len(event.token_ids))
                        yield self._event("completed", index, png, {"usage": usage})
                        num_whole += 1
                    elif isinstance(event, ImageProgress) and schedules[index].is_due(
                        event.index, event.num_tokens, event.total
                    ):
                        png = await self._renderer.partial(event.token_ids)
                        fields = {"partial_image_index": shown[index]}
                        yield self._event("partial_image", index, png, fields)
                        shown[index] += 1
        self._require_all(num_whole)

    async def whole(self) -> dict[str, Any]:
        """OpenAI's `ImagesResponse`."""
        pictures = [""] * self._num_images
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                for event in delta.events:
                    if isinstance(event, ImageDone):
                        pictures[delta.index] = await self._renderer.whole(event.token_ids)
        self._require_all(sum(map(bool, pictures)))
        counts = self._generation.counts
        return {
            "created": self._created_s,
            **self._format,
            "data": [{"b64_json": picture} for picture in pictures],
            "usage": _usage(counts, counts.image_tokens),
        }

    def _require_all(self, num_whole: int) -> None:
        """Raises DeadlineError when time was up before: a picture that was cut off is none."""
        if self._generation.has_timed_out and num_whole < self._num_images:
            raise DeadlineError(
                f"timeout_s passed when {num_whole} of {self._num_images} pictures were whole"
            )

    def _event(self, name: str, index: int, png: str, fields: dict[str, Any]) -> bytes:
        kind = f"{self._kind}.{name}"
        data = {
            "type": kind,
            "index": index,
            "b64_json": png,
            "created_at": self._created_s,
            **self._format,
            **fields,
        }
        return encode_event(data, kind)


def _usage(counts: TokenCounts, output_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": counts.prompt_tokens,
        "output_tokens": output_tokens,
        "total_tokens": counts.prompt_tokens + output_tokens,
        "input_tokens_details": {
            "text_tokens": counts.prompt_tokens - counts.prompt_image_tokens,
            "image_tokens": counts.prompt_image_tokens,
            "cached_tokens": counts.cached_tokens,
        },
    }
