"""Chat messages -> markup, user text and image places, by a checkpoint's `chat_template.jinja`.

The template is rendered in Jinja's immutable sandbox with a budget of steps and characters, so
that a bad one fails instead of hanging. What users wrote is fenced with private-use characters
before rendering; only text outside the fences counts as markup, in which special tokens and
image places are parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from momaserve.errors import CheckpointError, PromptError
from momaserve.tokens.prompt import ChatMessage, TextPart

OPEN, CLOSE = "\ue000", "\ue001"
"""Fences around what a user wrote; removed from the user's own text."""
IMAGE_PLACE = "<|image|>"
"""Stands for a picture in `content`, outside the fences."""
MAX_STEPS = 100_000
"""Loop rounds and calls of one rendering."""
MAX_MARKUP_CHARS = 100_000
"""Characters of one rendering besides the users' own."""

DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message.content }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""For checkpoints without a template: bos, then the contents, a line each."""

_FENCED = re.compile(f"{OPEN}([^{OPEN}{CLOSE}]*){CLOSE}")
_REMOVE_FENCES = str.maketrans("", "", OPEN + CLOSE)


@dataclass(frozen=True, slots=True)
class Markup:
    """What the template wrote: special tokens in it are parsed."""

    text: str


@dataclass(frozen=True, slots=True)
class UserText:
    """What a user wrote: never parsed."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """Where the next picture of the conversation stands."""


Segment = Markup | UserText | ImagePlace


class _TemplateRefusal(Exception):
    """The template called `raise_exception`."""


class _BudgetExceeded(Exception):
    """A rendering took too many steps or wrote too much."""


_steps_left: ContextVar[int] = ContextVar("steps_left")


def _spend_step() -> None:
    left = _steps_left.get()
    if left <= 0:
        raise _BudgetExceeded
    _steps_left.set(left - 1)


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend_step()
        yield item


def _raise_exception(message: object) -> None:
    raise _TemplateRefusal(str(message)[:200])


def _to_json(value: object, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, and escapes the fences too.
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Environment(ImmutableSandboxedEnvironment):
    """Counts calls; loops are counted by a filter that `ChatTemplate` puts around them."""

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _spend_step()
        return super().call(context, obj, *args, **kwargs)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["counted"] = _counted
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


class ChatTemplate:
    """One compiled template. Immutable; may be shared between threads."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """
        Args:
            source: Jinja; it sees `messages` (role and content each), `bos_token`, `eos_token`,
                `add_generation_prompt` and `raise_exception(message)`.

        Raises:
            CheckpointError: the template does not compile, or fails on a plain message.
        """
        environment = _environment()
        try:
            tree = environment.parse(source)
            for loop in tree.find_all(nodes.For):
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None)
            code = environment.compile(tree)
            self._template = environment.template_class.from_code(
                environment, code, environment.make_globals(None)
            )
        except (TemplateError, RecursionError, SyntaxError) as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from error
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._render([{"role": "user", "content": f"{OPEN}x{CLOSE}"}], True, 1)
        except _TemplateRefusal:
            pass  # it asks for other messages than this one
        except Exception as error:
            raise CheckpointError(
                f"the chat template fails on a plain message: {_reason(error)}"
            ) from error

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> list[Segment]:
        """Segments of a conversation, in order; neighbours of the same kind are possible.

        The k-th ImagePlace is the k-th picture of the messages.

        Raises:
            PromptError: the template refuses the messages or fails on them.
        """
        if not messages:
            raise PromptError("messages must not be empty", param="messages")
        contents = [_content(message) for message in messages]
        num_user_chars = sum(map(len, contents))
        rendered = [
            {"role": message.role, "content": content}
            for message, content in zip(messages, contents, strict=True)
        ]
        try:
            text = self._render(rendered, add_generation_prompt, num_user_chars)
        except _TemplateRefusal as error:
            said = str(error).translate(_REMOVE_FENCES)
            raise PromptError(f"the chat template says: {said}", param="messages") from None
        except Exception as error:
            raise PromptError(
                f"the chat template fails on these messages: {_reason(error)}", param="messages"
            ) from error
        segments = _split(text)
        num_images = sum(len(m.parts) for m in messages) - sum(
            isinstance(part, TextPart) for m in messages for part in m.parts
        )
        num_places = sum(isinstance(segment, ImagePlace) for segment in segments)
        if num_places != num_images:
            raise PromptError(
                f"the chat template gives {num_places} places to {num_images} pictures",
                param="messages",
            )
        return segments

    def _render(
        self, messages: list[dict[str, str]], add_generation_prompt: bool, num_user_chars: int
    ) -> str:
        chars_left = MAX_MARKUP_CHARS + num_user_chars
        pieces: list[str] = []
        token = _steps_left.set(MAX_STEPS)
        try:
            for piece in self._template.generate(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._variables
            ):
                chars_left -= len(piece)
                if chars_left < 0:
                    raise _BudgetExceeded
                pieces.append(piece)
        finally:
            _steps_left.reset(token)
        return "".join(pieces)


def _content(message: ChatMessage) -> str:
    return "".join(
        OPEN + part.text.translate(_REMOVE_FENCES) + CLOSE
        if isinstance(part, TextPart)
        else IMAGE_PLACE
        for part in message.parts
    )


def _split(text: str) -> list[Segment]:
    segments: list[Segment] = []
    for i, piece in enumerate(_FENCED.split(text)):
        if i % 2:  # re.split puts what the group matched at odd places
            segments.append(UserText(piece))
            continue
        if OPEN in piece or CLOSE in piece:
            raise PromptError("the chat template tears a message's text apart", param="messages")
        for j, markup in enumerate(piece.split(IMAGE_PLACE)):
            if j:
                segments.append(ImagePlace())
            if markup:
                segments.append(Markup(markup))
    return segments


def _reason(error: Exception) -> str:
    """What went wrong, without text from the messages."""
    if isinstance(error, _BudgetExceeded):
        return (
            f"it takes more than {MAX_STEPS} steps or writes more than {MAX_MARKUP_CHARS} "
            "characters of its own"
        )
    return type(error).__name__
