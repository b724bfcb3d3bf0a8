"""Text <-> token ids, over a Hugging Face `tokenizer.json`. Safe to share between threads."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from momaserve.errors import CheckpointError, PromptError
from momaserve.models.config import read_json_object


class TextTokenizer:
    """One vocabulary with two ways in: text that users wrote, and text that a template wrote.

    Invariant: `encode` never yields a special token or a control id, whatever the text says.
    """

    def __init__(self, definition: dict[str, Any], control_ids: Collection[int] = ()) -> None:
        """
        Args:
            definition: the object in `tokenizer.json`.
            control_ids: ids with a meaning of their own to the engine (bos, begin_image, image
                ids, …). Their spelling is ordinary text in `encode` even where `tokenizer.json`
                does not call them special.

        Raises:
            CheckpointError: the definition is not one of a tokenizer.
        """
        self._controls = frozenset(control_ids)
        self._markup = _build(definition)
        self._plain = _build(_with_special(definition, self._markup, self._controls))
        self._plain.encode_special_tokens = True
        self._token_bytes = _byte_level_vocabulary(self._markup, definition)

    @classmethod
    def load(cls, path: Path, *, control_ids: Collection[int] = ()) -> TextTokenizer:
        """Read a `tokenizer.json`. Raises CheckpointError naming the file."""
        definition = read_json_object(path)
        try:
            return cls(definition, control_ids)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @property
    def max_token_id(self) -> int:
        """The largest id of the vocabulary; -1 when it is empty."""
        return max(self._markup.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def token_bytes(self) -> Sequence[bytes] | None:
        """UTF-8 bytes of each id (empty for special tokens) where decoding is joining bytes.

        None for a tokenizer that is not byte-level: there a token's text depends on its
        neighbours.
        """
        return self._token_bytes

    def encode(self, text: str) -> list[int]:
        """Ids of text that a user wrote.

        Raises:
            PromptError: the text holds half of a surrogate pair.
        """
        ids = _encode(self._plain, text)
        if not self._controls.isdisjoint(ids):
            found = min(self._controls.intersection(ids))
            raise PromptError(f"the text contains control token {found}", param="prompt")
        return ids

    def encode_markup(self, text: str) -> list[int]:
        """Ids of text that a template wrote: special tokens in it are parsed."""
        return _encode(self._markup, text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids. Special tokens and ids without a token have none.

        Raises:
            PromptError: an id that is negative or has more than 32 bits.
        """
        try:
            text: str = self._markup.decode(list(token_ids), skip_special_tokens=True)
        except (OverflowError, TypeError):
            raise PromptError("token ids must be integers from 0 to 2**32 - 1") from None
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """How the vocabulary spells an id; None for an id without a token."""
        token: str | None = self._markup.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        return token


def _build(definition: dict[str, Any]) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _with_special(
    definition: dict[str, Any], tokenizer: Tokenizer, controls: frozenset[int]
) -> dict[str, Any]:
    """The definition with every added token among `controls` marked as special."""
    # The library gives an added token that the model knows the model's id, not the file's.
    added = [
        {**token, "special": True} if tokenizer.token_to_id(token["content"]) in controls else token
        for token in definition.get("added_tokens") or ()
    ]
    return {**definition, "added_tokens": added}


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        # A post-processor's own bos and eos are left out: the template writes them.
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    except TypeError:
        raise PromptError("the text contains a lone surrogate", param="prompt") from None
    return ids


def _byte_level_vocabulary(
    tokenizer: Tokenizer, definition: dict[str, Any]
) -> tuple[bytes, ...] | None:
    decoder = definition.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        return None
    byte_of = _byte_alphabet()
    special = {t["content"] for t in definition.get("added_tokens") or () if t["special"]}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token not in special:
            known = all(char in byte_of for char in token)
            table[token_id] = bytes(byte_of[c] for c in token) if known else token.encode()
    return tuple(table)


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}
