"""Fields of `POST /v1/images/edits`, which come as a form: every value is a string."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from momaserve_server.schemas_images import ImageRequest


class EditRequest(ImageRequest):
    """As for a new picture. The files `image` and `mask` are no fields of it."""

    model_config = ConfigDict(strict=False)

    keep_rows: Annotated[int, Field(ge=0)] | None = None
    """Rows of codes that stay as they are; left out, what the mask says, or half of them."""
    input_fidelity: Any = None
    output_compression: Any = None
    """OpenAI's; accepted, without effect: a PNG has no loss."""
