"""Body of `POST /v1/images/generations`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from momaserve_server.schemas_common import GenerationFields

MAX_PARTIAL_IMAGES = 3
"""OpenAI's own limit."""


class ImageRequest(GenerationFields):
    prompt: Annotated[str, Field(min_length=1)]
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    background: Literal["auto", "opaque"] | None = None
    size: str | None = None
    """"auto" or the model's own size, such as "64x64"."""
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None
    quality: Any = None
    style: Any = None
    moderation: Any = None
    """These three are OpenAI's; accepted, without effect."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ImageRequest:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream: true")
        return self
