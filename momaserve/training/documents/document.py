"""One document as the trainer learns it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A row's worth of tokens or less; begins with bos and ends with eos."""

    token_ids: list[int]
    learnt: list[bool]
    """Of each token, whether the model learns to say it; never of bos."""
    key: int
    """Hash of the content (63 bits), whatever the order of its parts: alike documents, and the
    pieces of one, have the same and stay together when the data is split."""
    num_pictures: int
    is_chat: bool
