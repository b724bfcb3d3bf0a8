"""The ids of a model trained on a user's data: words, controls and picture codes.

Ids below `text_vocab_size` belong to the text tokenizer, the picture codes follow.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from momaserve.errors import DataError
from momaserve.models.image_tokenizer import ImageTokenizerConfig
from momaserve.tokens.template import DEFAULT_TEMPLATE, ChatTemplate
from momaserve.tokens.text import TextTokenizer
from momaserve.training.dictionary.corpus import SPECIAL_TOKENS, byte_level_bpe
from momaserve.training.documents.reader import read_records
from momaserve.training.documents.record import Record

CHAT_TEMPLATE = """\
{#- A separator ends what the assistant is to answer, eos ends its answer. -#}
{{- bos_token -}}
{%- for message in messages -%}
{{- message.content -}}
{{- eos_token if message.role == 'assistant' else '<|sep|>' -}}
{%- endfor -%}
"""
"""For data with conversations. Other data is served by DEFAULT_TEMPLATE: a prompt begins as a
document does, and the answer goes on with it."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Text tokenizer, control ids and picture codes. Build it with `parse`, which checks them."""

    tokenizer: Tokenizer
    text: TextTokenizer
    """Cuts words as serving does: nothing that a user wrote becomes a special token."""
    controls: dict[str, int]
    """Id of each of SPECIAL_TOKENS."""
    text_size: int
    image: ImageTokenizerConfig | None

    @classmethod
    def parse(
        cls, definition: str, text_size: int, image: ImageTokenizerConfig | None
    ) -> Vocabulary:
        """From the content of a `tokenizer.json`.

        Raises:
            DataError: it is broken, lacks a special token, or has ids beyond `text_size`.
        """
        try:
            tokenizer = Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer.json holds no tokenizer: {error}") from error
        found = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        missing = [token for token, number in found.items() if number is None]
        if missing:
            raise DataError(f"tokenizer.json has no {', '.join(missing)}: it is none of ours")
        controls = {token: number for token, number in found.items() if number is not None}
        codes = range(text_size, text_size + (0 if image is None else image.num_codes))
        text = TextTokenizer(json.loads(definition), control_ids={*controls.values(), *codes})
        if text.max_token_id >= text_size:
            raise DataError(
                f"tokenizer.json has ids up to {text.max_token_id}, but text_vocab_size is "
                f"{text_size}"
            )
        return cls(tokenizer, text, controls, text_size, image)

    @property
    def bos(self) -> int:
        return self.controls["<|bos|>"]

    @property
    def pad(self) -> int:
        return self.controls["<|pad|>"]

    @property
    def eos(self) -> int:
        return self.controls["<|eos|>"]

    @property
    def tokens_per_image(self) -> int:
        """Codes of a picture; 0 without an image tokenizer."""
        return 0 if self.image is None else self.image.grid_size**2

    def image_span(self, ids: list[int]) -> list[int]:
        """The tokens of a picture of these image ids."""
        return [self.controls["<|begin_image|>"], *ids, self.controls["<|end_image|>"]]

    def chat_template(self) -> ChatTemplate:
        return ChatTemplate(CHAT_TEMPLATE, bos_token="<|bos|>", eos_token="<|eos|>")

    def config_ids(self) -> dict[str, Any]:
        """The keys of `config.json` that follow from the tokenizers."""
        image: dict[str, Any] | None = None
        if self.image is not None:
            image = {
                "first_token_id": self.text_size,
                "num_codes": self.image.num_codes,
                "tokens_per_image": self.tokens_per_image,
                "grid": [self.image.grid_size, self.image.grid_size],
                "begin_token_id": self.controls["<|begin_image|>"],
                "end_token_id": self.controls["<|end_image|>"],
            }
        return {
            "vocab_size": self.text_size + (0 if self.image is None else self.image.num_codes),
            "bos_token_id": self.bos,
            "pad_token_id": self.pad,
            "eos_token_id": self.eos,
            "image": image,
        }


def template_source(num_chats: int) -> str:
    """The chat template under which a prompt begins as the documents of the data do."""
    return CHAT_TEMPLATE if num_chats else DEFAULT_TEMPLATE


def make_text_tokenizer(data: Path, vocab_size: int) -> str:
    """Train a tokenizer on every text of a data set; returns the content of tokenizer.json.

    Raises:
        DataError: no data set.
    """
    records = (record for record in read_records(data) if isinstance(record, Record))
    texts = (text for record in records for text in record.texts)
    definition: str = byte_level_bpe(texts, vocab_size).to_str()
    return definition
