"""Bodies of `POST /v1/tokenize` and `POST /v1/detokenize`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from momaserve_server.schemas_chat import Message
from momaserve_server.schemas_common import StrictBody


class TokenizeRequest(StrictBody):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """bos and the chat template around `prompt`; true when left out."""
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _is_about_one_thing(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages is not None and self.add_special_tokens is False:
            raise ValueError("add_special_tokens: false needs a prompt: messages have a template")
        return self


class DetokenizeRequest(StrictBody):
    model: str | None = None
    tokens: list[int]
