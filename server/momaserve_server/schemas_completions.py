"""Body of `POST /v1/completions`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from momaserve.sampling import MAX_LOGPROBS
from momaserve_server.schemas_common import OneOnly, SamplingFields, described

DEFAULT_MAX_TOKENS = 16
"""OpenAI's own default for this route."""

PromptField = Annotated[
    str | list[int] | list[str] | list[list[int]],
    described("a string, a list of token ids, a list of strings or a list of lists of token ids"),
]


class CompletionRequest(SamplingFields):
    prompt: PromptField
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: OneOnly = None
    suffix: None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one; an empty list of anything counts as one empty prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]
