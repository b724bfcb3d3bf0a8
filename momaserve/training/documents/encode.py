"""Records -> documents of token ids, with a mark on the ids that are learnt.

A document is `bos`, words and pictures in order, `eos`; all of it but `bos` is learnt. Of a
conversation only the assistant's answers are, each with the `eos` that ends it, and it reads as
the served chat template writes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from momaserve.errors import PromptError
from momaserve.models.image_tokenizer import ImageAutoencoder
from momaserve.tokens.prompt import ChatMessage, ImagePart, TextPart
from momaserve.tokens.template import ImagePlace, Markup, UserText
from momaserve.training.demo import encode_pictures
from momaserve.training.documents.document import Document
from momaserve.training.documents.pictures import square
from momaserve.training.documents.reader import read_records
from momaserve.training.documents.record import Record, Skipped, Turn, UnusableError
from momaserve.training.documents.vocabulary import Vocabulary

NO_IMAGE_TOKENIZER = "a picture, but no image tokenizer is given"
TOO_LONG = "the document is longer than a row"
NOT_ENCODABLE = "the text cannot be encoded"
BROKEN_TEMPLATE = "the chat template writes answers differently from prompts"

BATCH_PICTURES = 64
BATCH_RECORDS = 256
_SOME_PICTURE = ImagePart(Image.new("RGB", (1, 1)))
"""Stands for any picture while a template is rendered."""


class Encoder:
    """Encodes records with one pair of tokenizers; pictures of several records at once."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        model: ImageAutoencoder | None,
        *,
        row_length: int,
        split_long: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.model = model
        self.row_length = row_length
        self.split_long = split_long
        self._template = vocabulary.chat_template()

    def encode(self, path: Path, seed: int) -> Iterator[Document | Skipped]:
        """The documents of a data set in its order, but a batch's skipped records come first."""
        waiting: list[Record] = []
        pixels: list[np.ndarray[Any, Any]] = []
        for record in read_records(path, seed):
            if isinstance(record, Skipped):
                yield record
                continue
            try:
                pixels += self._pixels(record)
            except UnusableError as error:
                yield Skipped(record.where, error.reason, error.detail)
                continue
            waiting.append(record)
            if len(pixels) >= BATCH_PICTURES or len(waiting) >= BATCH_RECORDS:
                yield from self._batch(waiting, pixels)
                waiting, pixels = [], []
        yield from self._batch(waiting, pixels)

    def _pixels(self, record: Record) -> list[np.ndarray[Any, Any]]:
        """The record's pictures. Raises UnusableError before one is opened if they are too many."""
        pictures = record.pictures
        if not pictures:
            return []
        if self.model is None:
            raise UnusableError(NO_IMAGE_TOKENIZER)
        num_tokens = len(pictures) * (self.vocabulary.tokens_per_image + 2) + 2
        self._check_length(num_tokens)
        return [square(picture, self.model.config.image_size) for picture in pictures]

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self.row_length:
            raise UnusableError(
                f"{TOO_LONG} ({self.row_length} tokens)", f"at least {num_tokens} tokens"
            )

    def _batch(
        self, records: Sequence[Record], pixels: Sequence[np.ndarray[Any, Any]]
    ) -> Iterator[Document | Skipped]:
        spans: Iterator[list[int]] = iter(())
        if pixels:
            assert self.model is not None
            codes = encode_pictures(self.model, np.stack(pixels), self.vocabulary.text_size)
            spans = iter([self.vocabulary.image_span(ids) for ids in codes])
        for record in records:
            own = [next(spans) for _ in record.pictures]
            try:
                yield from self._documents(record, own)
            except UnusableError as error:
                yield Skipped(record.where, error.reason, error.detail)
            except PromptError as error:
                yield Skipped(record.where, NOT_ENCODABLE, str(error))

    def _documents(self, record: Record, spans: list[list[int]]) -> list[Document]:
        if record.is_chat:
            token_ids, learnt = self._chat(record.turns, spans)
        else:
            token_ids = self._text_and_pictures(record.turns[0], iter(spans))
            learnt = [False] + [True] * (len(token_ids) - 1)
        key = _key(record, spans)
        if len(token_ids) <= self.row_length:
            return [Document(token_ids, learnt, key, len(spans), record.is_chat)]
        if not self.split_long or record.is_chat or spans:
            self._check_length(len(token_ids))
        return self._pieces(token_ids[1:-1], key)

    def _text_and_pictures(self, turn: Turn, spans: Iterator[list[int]]) -> list[int]:
        token_ids = [self.vocabulary.bos]
        for part in turn.parts:
            if isinstance(part, TextPart):
                token_ids += self.vocabulary.text.encode(part.text)
            else:
                token_ids += next(spans)
        return [*token_ids, self.vocabulary.eos]

    def _pieces(self, token_ids: list[int], key: int) -> list[Document]:
        """A long text in pieces; the eos of all but the last is there but not learnt, for the
        text does not end there."""
        size = self.row_length - 2
        pieces = []
        for start in range(0, len(token_ids), size):
            piece = token_ids[start : start + size]
            is_last = start + size >= len(token_ids)
            ids = [self.vocabulary.bos, *piece, self.vocabulary.eos]
            pieces.append(Document(ids, [False, *[True] * len(piece), is_last], key, 0, False))
        return pieces

    def _chat(self, turns: Sequence[Turn], spans: list[list[int]]) -> tuple[list[int], list[bool]]:
        """A conversation; learnt is what follows each prompt that serving would have made."""
        self._check_length(len(turns) + 2)  # no turn is empty
        messages = [_message(turn) for turn in turns]
        words: dict[str, list[int]] = {}
        token_ids: list[int] = []
        learnt: list[bool] = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            prompt = self._rendered(messages[:number], spans, words, is_prompt=True)
            answered = self._rendered(messages[: number + 1], spans, words, is_prompt=False)
            if prompt[: len(token_ids)] != token_ids or answered[: len(prompt)] != prompt:
                raise UnusableError(BROKEN_TEMPLATE)
            learnt += [False] * (len(prompt) - len(token_ids))
            learnt += [True] * (len(answered) - len(prompt))
            token_ids = answered
            self._check_length(len(token_ids))
        return token_ids, learnt

    def _rendered(
        self,
        messages: list[ChatMessage],
        spans: list[list[int]],
        words: dict[str, list[int]],
        *,
        is_prompt: bool,
    ) -> list[int]:
        """`words` keeps what was encoded, since each turn renders all before it again."""
        if not messages:  # the assistant speaks first: nothing was asked
            return [self.vocabulary.bos]
        remaining = iter(spans)
        token_ids: list[int] = []
        for segment in self._template.render(messages, add_generation_prompt=is_prompt):
            match segment:
                case Markup(text):
                    token_ids += self.vocabulary.text.encode_markup(text)
                case UserText(text):
                    if text not in words:
                        words[text] = self.vocabulary.text.encode(text)
                    token_ids += words[text]
                case ImagePlace():
                    token_ids += next(remaining)
        return token_ids


def _message(turn: Turn) -> ChatMessage:
    assert turn.role is not None
    parts = (part if isinstance(part, TextPart) else _SOME_PICTURE for part in turn.parts)
    return ChatMessage(turn.role, tuple(parts))


def _key(record: Record, spans: list[list[int]]) -> int:
    contents = [text.encode() for text in record.texts]
    contents += [np.array(span, dtype="<i4").tobytes() for span in spans]
    digests = sorted(hashlib.sha256(content).digest() for content in contents)
    return int.from_bytes(hashlib.sha256(b"".join(digests)).digest()[:8], "little") >> 1
