"""`POST /v1/images/edits`: goes on with a picture from its first rows."""

from __future__ import annotations

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.responses import Response

from momaserve.errors import PromptError, SamplingError
from momaserve.tokens.image import ImageLimits, fit_square, open_image
from momaserve.tokens.prompt import Prompt
from momaserve_server import examples
from momaserve_server.context import ServerContext, context_of
from momaserve_server.errors import InvalidBodyError
from momaserve_server.form import read_form
from momaserve_server.openapi import GENERATES, form_body
from momaserve_server.pictures import require_pixels
from momaserve_server.prompts import encode_text
from momaserve_server.routes_images import ImageReply, checked_size, start_drawing
from momaserve_server.sampling_params import image_params
from momaserve_server.schemas_edits import EditRequest
from momaserve_server.sse import EventStreamResponse, until_disconnect

router = APIRouter()

FILES = ("image", "mask")
OPAQUE = 255


@router.post(
    "/v1/images/edits",
    openapi_extra=form_body(
        EditRequest, FILES, ("image",), examples.IMAGE_REPLY, statuses=GENERATES
    ),
)
async def edit_image(request: Request) -> Response:
    context = context_of(request)
    context.check_accepting()
    body, files = await read_form(request, EditRequest, FILES)
    context.check_model(body.model)
    engine = context.async_engine.engine
    params = image_params(body, engine, context.settings)
    size = checked_size(body.size, engine.processor)
    prompt = await context.workers.run(_prompt, context, body, files)
    generation = await start_drawing(context, request, body, prompt, params)
    reply = ImageReply(context, body, generation, params.n, size, kind="image_edit")
    if body.stream:
        return EventStreamResponse(reply.stream(), generation.close)
    try:
        return JSONResponse(await until_disconnect(request.receive, reply.whole()))
    finally:
        generation.close()


def _prompt(context: ServerContext, body: EditRequest, files: dict[str, bytes]) -> Prompt:
    """The prompt, and behind it the picture's first rows, left open."""
    if "image" not in files:
        raise InvalidBodyError("'image' is required", param="image", code="missing_field")
    engine = context.async_engine.engine
    processor = engine.processor
    side = require_pixels(processor).image_size
    assert engine.model_config.image is not None
    rows, columns = engine.model_config.image.grid
    image = _open(context, files["image"], "image")
    mask = _open(context, files["mask"], "mask") if "mask" in files else None
    keep_rows = body.keep_rows
    if keep_rows is None:
        keep_rows = rows // 2
        if mask is not None:
            keep_rows = first_masked_row(mask, image.size, side) * rows // side
    if keep_rows >= rows:
        raise SamplingError(
            f"keep_rows must be below {rows}, the rows of codes of a picture, got {keep_rows}",
            param="keep_rows",
        )
    codes = processor.encode_image(image)[1 : 1 + keep_rows * columns]
    begin_image = processor.spec.begin_image
    assert begin_image is not None
    words = encode_text(processor, body.prompt)
    return processor.encode_ids((*words.token_ids, begin_image, *codes))


def _open(context: ServerContext, data: bytes, name: str) -> Image.Image:
    settings = context.settings
    limits = ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_image_pixels)
    try:
        return open_image(data, limits)
    except PromptError as error:
        raise PromptError(str(error), param=name) from None


def first_masked_row(mask: Image.Image, size: tuple[int, int], side: int) -> int:
    """The first row of pixels, of a square of `side`, that the mask has transparent.

    Args:
        size: width and height of the picture that the mask lies on.

    Raises:
        SamplingError: the mask has another size, or nothing of it is transparent.
    """
    if mask.size != size:
        raise SamplingError(
            f"the mask has {mask.width} x {mask.height} pixels, the picture {size[0]} x {size[1]}",
            param="mask",
        )
    alpha = np.asarray(mask.convert("RGBA").getchannel("A"))
    # What is to be drawn anew, as black on white, takes the picture's own way to its square.
    shape = Image.fromarray(np.where(alpha < OPAQUE, 0, 255).astype(np.uint8))
    drawn = (np.asarray(fit_square(shape, side).convert("L")) < OPAQUE // 2).any(axis=1)
    if not drawn.any():
        raise SamplingError("the mask has no transparent pixels to draw anew", param="mask")
    return int(np.argmax(drawn))
