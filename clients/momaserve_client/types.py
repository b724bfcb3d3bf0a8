"""What the server answers, as immutable objects. Pictures are PNG bytes that can save themselves.

Replies compare by what they say: `request_id` takes no part in `==`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from momaserve_client.images import Png


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What all replies have."""

    request_id: str | None = field(default=None, compare=False)
    """The id by which the server's log and `abort` know the request."""


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
class TokenRouting:
    """What one generated token used (`include_routing`)."""

    token_id: int
    group: str
    experts: tuple[tuple[int, ...] | None, ...] | None
    """One item per layer: experts of `group`, or None where a depth-routed layer let the token
    pass. None as a whole for a token that was never computed, as the last of an answer may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatChoice:
    index: int
    parts: tuple[str | Png, ...]
    """Text and pictures in the order generated."""
    finish_reason: str | None
    token_ids: tuple[int, ...] | None = None
    """With `return_token_ids`."""
    logprobs: Mapping[str, Any] | None = None
    """As the server sent it: OpenAI's shape."""
    routing: tuple[TokenRouting, ...] | None = None
    """With `include_routing`: one entry per generated token."""

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Png, ...]:
        return tuple(part for part in self.parts if isinstance(part, Png))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReply(Reply):
    id: str
    model: str
    choices: tuple[ChatChoice, ...]
    """At least one."""
    usage: Usage

    @property
    def parts(self) -> tuple[str | Png, ...]:
        """Text and pictures of the first choice; `message("assistant", *reply.parts)` goes on."""
        return self.choices[0].parts

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def images(self) -> tuple[Png, ...]:
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
    routing: tuple[TokenRouting, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionReply(Reply):
    id: str
    model: str
    choices: tuple[CompletionChoice, ...]
    """At least one. Choice `i` of prompt `p` has the index `p * n + i`."""
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagesReply(Reply):
    images: tuple[Png, ...]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class TextChunk:
    text: str
    choice: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageChunk:
    """A picture as far as it is known."""

    png: Png
    is_whole: bool
    choice: int = 0
    index: int = 0
    """Number of the picture within its choice."""
    tokens_done: int | None = None
    tokens_total: int | None = None
    """Both None on the images routes, which do not tell."""
    usage: Usage | None = None
    """Of this picture, when it is whole; the images routes alone tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensChunk:
    """Tokens of a choice, where the request asked for ids, log-probabilities or routing."""

    choice: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: Mapping[str, Any] | None = None
    """As the server sent it: OpenAI's shape."""
    routing: tuple[TokenRouting, ...] = ()
    """Lags behind `token_ids`: what a token used is known one step after it was sampled."""


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
    token_ids: tuple[int, ...] = ()
    logprobs: CompletionLogprobs | None = None
    routing: tuple[TokenRouting, ...] = ()


ChatEvent = TextChunk | ImageChunk | TokensChunk | FinishChunk | UsageChunk
CompletionEvent = CompletionChunk | FinishChunk | UsageChunk


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpan:
    """A picture among tokens, from begin_image to end_image."""

    start: int
    end: int
    """One past the last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeReply(Reply):
    tokens: tuple[int, ...]
    max_model_len: int
    modalities: tuple[str, ...]
    """"text" or "image" of each token."""
    image_spans: tuple[ImageSpan, ...]
    token_strs: tuple[str, ...] | None = None
    """With `return_token_strs`."""

    @property
    def count(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeReply(Reply):
    text: str
    """Of all text tokens."""
    parts: tuple[str | Png, ...]
    """Text and pictures in order; a picture that is not whole is shown as far as it goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortReply(Reply):
    """The request that was aborted is `id`; `request_id` is that of the abort itself."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Model(Reply):
    id: str
    max_model_len: int
    modalities: tuple[str, ...]
    raw: Mapping[str, Any]
    """Everything that the server says about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version(Reply):
    version: str
    """Of the server."""
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLayer:
    """One layer of an expert group; all counts are totals since the server started."""

    layer: int
    expert_tokens: tuple[int, ...]
    """Tokens that each expert computed."""
    load: tuple[float, ...] | None
    """Their shares of the sum; None before the first."""
    mean_experts_per_token: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterGroup:
    name: str
    modalities: tuple[str, ...]
    num_experts: int
    num_tokens: int
    mean_experts_per_token: float | None
    """Over layers and tokens; None before the first."""
    experts_per_token: tuple[int, ...]
    """At place k the number of (token, layer) pairs that used k experts."""
    layers: tuple[RouterLayer, ...]
    """Empty where there is one expert and so no router."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthLayer:
    """A layer that lets tokens pass."""

    layer: int
    taken: int
    skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Router(Reply):
    """Totals since the server started; a live view takes differences between two reads."""

    routing: str
    prompt_routing: str
    num_steps: int
    groups: tuple[RouterGroup, ...]
    depth: tuple[DepthLayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    is_healthy: bool
    """The engine makes progress."""
    is_ready: bool
    """New requests are taken."""
    reason: str | None = None
    """The error code where one of them is False, such as "draining"."""
