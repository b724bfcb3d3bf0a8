"""Text prompts of the routes that have no messages."""

from __future__ import annotations

from momaserve.errors import PromptError
from momaserve.tokens.processor import Processor
from momaserve.tokens.prompt import Prompt


def encode_text(processor: Processor, text: str) -> Prompt:
    """`text` as one user message.

    Raises:
        PromptError: as `Processor.encode_chat`, but the field at fault is `prompt`.
    """
    try:
        return processor.encode_text(text)
    except PromptError as error:
        raise PromptError(str(error), param="prompt") from error
