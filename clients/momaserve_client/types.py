"""What the server answers, as immutable objects. Pictures are PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int = 0
    """Picture tokens among `completion_tokens`."""
    cached_tokens: int = 0
    """Tokens among `prompt_tokens` that the server had computed before."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatChoice:
    index: int
    parts: tuple[str | bytes, ...]
    """Text and pictures (PNG) in the order generated."""
    finish_reason: str | None
    token_ids: tuple[int, ...] | None = None
    logprobs: Mapping[str, Any] | None = None
    """As the server sent it: OpenAI's shape."""

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[bytes, ...]:
        return tuple(part for part in self.parts if isinstance(part, bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply:
    id: str
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def images(self) -> tuple[bytes, ...]:
        """Pictures of the first choice."""
        return self.choices[0].images


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionLogprobs:
    """One entry per token; those for the first token of an echoed prompt are None."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float | None, ...]
    top_logprobs: tuple[Mapping[str, float] | None, ...]
    text_offset: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionChoice:
    index: int
    text: str
    finish_reason: str | None
    token_ids: tuple[int, ...] | None = None
    logprobs: CompletionLogprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionReply:
    id: str
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesReply:
    images: tuple[bytes, ...]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class TextChunk:
    text: str
    choice: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageChunk:
    """A picture as far as it is known."""

    png: bytes
    is_whole: bool
    choice: int = 0
    index: int = 0
    """Number of the picture within its choice."""
    tokens_done: int | None = None
    tokens_total: int | None = None
    """Both None on the images route, which does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishChunk:
    """A choice is over."""

    reason: str
    """"stop", "length", or "timeout" where `timeout_s` cut it off."""
    choice: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageChunk:
    """The last event of a stream."""

    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionChunk:
    text: str
    choice: int = 0
    token_ids: tuple[int, ...] | None = None
    logprobs: CompletionLogprobs | None = None


ChatEvent = TextChunk | ImageChunk | FinishChunk | UsageChunk
CompletionEvent = CompletionChunk | FinishChunk | UsageChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    id: str
    max_model_len: int
    modalities: tuple[str, ...]
    raw: Mapping[str, Any]
    """Everything that the server says about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    is_healthy: bool
    """The engine makes progress."""
    is_ready: bool
    """New requests are taken."""
