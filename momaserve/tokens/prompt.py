"""What a request says: token ids, or messages of text and pictures that become token ids."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from momaserve.errors import PromptError

ROLES = ("system", "user", "assistant")
"""Who may speak. A closed set, because a template may write the role as markup."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine takes it: ids that passed `Grammar.scan`."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    image: Image.Image
    """Any size and mode; the codec fits it to its square."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation.

    Raises:
        PromptError: a role that is not one of `ROLES`.
    """

    role: str
    parts: tuple[TextPart | ImagePart, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            shown = self.role if isinstance(self.role, str) else type(self.role).__name__
            raise PromptError(
                f"role must be one of {list(ROLES)}, got {shown[:40]!r}", param="messages"
            )
