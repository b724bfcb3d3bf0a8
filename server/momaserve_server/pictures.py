"""Generated pictures: which unfinished states a stream shows, and image ids -> PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from momaserve.errors import SamplingError
from momaserve.tokens.image import ImageCodec
from momaserve.tokens.processor import Processor
from momaserve_server.workers import Workers

DATA_URL = "data:image/png;base64,"


def require_pixels(processor: Processor) -> ImageCodec:
    """The image tokenizer of the checkpoint.

    Raises:
        SamplingError: it has none, so pictures cannot be shown.
    """
    if processor.image is None:
        raise SamplingError(
            "this checkpoint has no image_tokenizer: it makes no pictures", param="modalities"
        )
    return processor.image


def partial_marks(total: int, num_partial: int) -> tuple[int, ...]:
    """Token counts at which a growing picture is shown: evenly spread, below `total`."""
    marks = (total * (i + 1) // (num_partial + 1) for i in range(num_partial))
    return tuple(sorted({mark for mark in marks if 0 < mark < total}))


class PartialSchedule:
    """Says when the pictures of one answer are due to be shown. Owns one mark per picture."""

    def __init__(self, num_partial: int) -> None:
        self._num_partial = num_partial
        self._shown: dict[int, int] = {}  # picture -> tokens done when it was last shown

    def is_due(self, index: int, num_tokens: int, total: int) -> bool:
        """Whether picture `index` passed a mark since it was last shown."""
        shown = self._shown.get(index, 0)
        if not any(shown < mark <= num_tokens for mark in partial_marks(total, self._num_partial)):
            return False
        self._shown[index] = num_tokens
        return True


class PictureRenderer:
    """Renders in worker threads: a picture takes some milliseconds of CPU."""

    def __init__(self, processor: Processor, workers: Workers) -> None:
        self._processor = processor
        self._workers = workers

    async def whole(self, token_ids: Sequence[int]) -> str:
        """PNG of a finished picture, in base64."""
        return await self._workers.run(self._render, tuple(token_ids), False)

    async def partial(self, token_ids: Sequence[int]) -> str:
        """PNG of a picture of which some codes are missing, in base64."""
        return await self._workers.run(self._render, tuple(token_ids), True)

    def _render(self, token_ids: tuple[int, ...], is_partial: bool) -> str:
        processor = self._processor
        image = (processor.render_partial if is_partial else processor.render)(token_ids)
        return png_base64(image)


def png_base64(image: Image.Image) -> str:
    return base64.b64encode(png_bytes(image)).decode("ascii")


def png_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
