"""Log-probabilities as the two text routes report them, and how a token is spelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from momaserve.outputs import TokenLogprob
from momaserve.tokens.text import TextTokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

REPLACEMENT = "\ufffd"
MAX_UTF8_BYTES = 4


class TokenNames:
    """Spells token ids: their text, or `bytes:\\xe2` for part of a character, or `token_id:7`
    for ids without text (pictures, control tokens, a checkpoint without tokenizer)."""

    def __init__(self, tokenizer: TextTokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._table = tokenizer.token_bytes if tokenizer is not None else None

    def bytes_of(self, token_id: int) -> bytes | None:
        """UTF-8 of the token; None for ids without text of their own."""
        if self._table is None:
            return None
        return (self._table[token_id] if 0 <= token_id < len(self._table) else b"") or None

    def name(self, token_id: int) -> str:
        raw = self.bytes_of(token_id)
        if raw is not None:
            try:
                return raw.decode()
            except UnicodeDecodeError:
                return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        spelled = None if self._tokenizer is None else self._tokenizer.id_to_token(token_id)
        return f"token_id:{token_id}" if spelled is None else spelled


class TextOffsets:
    """Where tokens begin in the text that they make, counted in characters, as they arrive."""

    def __init__(self, tokenizer: TextTokenizer | None, start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._num_chars = start
        self._open_ids: list[int] = []  # tokens of a character whose bytes are not all there

    def push(self, token_ids: Sequence[int]) -> list[int]:
        """For each token: characters that are complete before it."""
        offsets: list[int] = []
        for token_id in token_ids:
            offsets.append(self._num_chars)
            if self._tokenizer is None:
                continue
            self._open_ids.append(token_id)
            text = self._tokenizer.decode(self._open_ids)
            if not text.endswith(REPLACEMENT) or len(self._open_ids) == MAX_UTF8_BYTES:
                self._num_chars += len(text)
                self._open_ids.clear()
        return offsets


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def chat_logprobs(entries: Sequence[TokenLogprob], names: TokenNames) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        raw = names.bytes_of(token_id)
        return {
            "token": names.name(token_id),
            "logprob": _finite(logprob),
            "bytes": None if raw is None else list(raw),
        }

    return {
        "content": [
            entry(item.token_id, item.logprob)
            | {"top_logprobs": [entry(token_id, logprob) for token_id, logprob in item.top]}
            for item in entries
        ],
        "refusal": None,
    }


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
    names: TokenNames,
) -> dict[str, list[Any]]:
    """`choices[].logprobs` of a completion; None for the first token of a prompt."""
    return {
        "tokens": [names.name(token_id) for token_id in token_ids],
        "token_logprobs": [None if item is None else _finite(item.logprob) for item in entries],
        "top_logprobs": [None if item is None else _likeliest(item, names) for item in entries],
        "text_offset": list(offsets),
    }


def _likeliest(item: TokenLogprob, names: TokenNames) -> dict[str, float]:
    """The likeliest tokens and, as OpenAI has it, the token itself."""
    pairs = [*item.top, (item.token_id, item.logprob)]
    return {names.name(token_id): _finite(logprob) for token_id, logprob in pairs}
