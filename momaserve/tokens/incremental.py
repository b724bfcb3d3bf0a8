"""Token ids -> text while they arrive, at constant cost per token.

The pieces joined equal the tokenizer's `decode` of all ids. A character is given out once all
its bytes are there.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from momaserve.tokens.text import TextTokenizer

_REPLACEMENT = "\ufffd"
_MAX_WINDOW = 64
"""Ids that a window may hold before its text is given out as it stands."""


class IncrementalText(Protocol):
    """One stretch of text tokens."""

    def push(self, token_id: int) -> str:
        """Text that this id made certain; often that of the id itself, sometimes ''."""

    def finish(self) -> str:
        """What was held back; afterwards a new stretch begins."""


def incremental_text(tokenizer: TextTokenizer | None) -> IncrementalText:
    """The decoder that fits a tokenizer; without one every text is ''."""
    if tokenizer is None:
        return _NoText()
    table = tokenizer.token_bytes
    return _WindowText(tokenizer) if table is None else _ByteText(table)


class _NoText:
    def push(self, token_id: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class _ByteText:
    """Byte-level BPE: decoding is joining bytes, so UTF-8's own state is all there is to keep."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._table[token_id]) if token_id < len(self._table) else ""

    def finish(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _WindowText:
    """Any other tokenizer: decode a few ids again, with those before them as context.

    The window holds ids whose text was given out (the first `_num_given` of them) and then ids
    that end in an incomplete character. Context matters because, say, a leading space is
    dropped at the start of a text only.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_given = 0

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        given = self._tokenizer.decode(self._window[: self._num_given])
        text = self._tokenizer.decode(self._window)
        is_held = len(text) <= len(given) or text.endswith(_REPLACEMENT)
        if is_held and len(self._window) < _MAX_WINDOW:
            return ""
        del self._window[: self._num_given]
        self._num_given = len(self._window)
        return text[len(given) :]

    def finish(self) -> str:
        given = self._tokenizer.decode(self._window[: self._num_given])
        text = self._tokenizer.decode(self._window)
        self._window.clear()
        self._num_given = 0
        return text[len(given) :]
