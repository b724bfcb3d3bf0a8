"""Body of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from momaserve.sampling import MAX_LOGPROBS
from momaserve_server.schemas_common import Modalities, SamplingFields, StrictBody

DEFAULT_PARTIAL_IMAGES = 4
MAX_PARTIAL_IMAGES = 64


class ImageUrl(StrictBody):
    url: str
    """A `data:image/...;base64,...` URL."""
    detail: Any = None
    """OpenAI's resolution hint; accepted, has no effect: pictures have one size here."""


class ContentPart(StrictBody):
    """One piece of a message: words or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _has_its_own_field(self) -> ContentPart:
        other = "image_url" if self.type == "text" else "text"
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type!r} needs the field {self.type!r}")
        if getattr(self, other) is not None:
            raise ValueError(f"a part of type {self.type!r} cannot have the field {other!r}")
        return self


class Message(StrictBody):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: Any = None
    """Accepted, has no effect."""
    refusal: None = None
    """OpenAI's clients send assistant messages back with this field; it must be null."""


class ChatRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of `max_tokens`."""
    modalities: Modalities | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None
    """Unfinished states of each picture that a stream shows before the whole one."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError(
                f"max_tokens ({both[0]}) and max_completion_tokens ({both[1]}) disagree"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.modalities is not None and not self.modalities:
            raise ValueError('modalities must name "text", "image" or both')
        return self
