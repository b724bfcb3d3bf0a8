"""The dictionary's files as the trainers read them: items, pictures, glosses, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from momaserve.errors import DataError
from momaserve.training.dictionary.item import Item
from momaserve.training.dictionary.wrappers import DRAW_WRAPPERS, GLOSS_WRAPPERS, wrap

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|pad|>",
    "<|eos|>",
    "<|begin_image|>",
    "<|end_image|>",
    "<|sep|>",
)
_QUESTIONS = ("what is this?", "name this picture", "tell me about")


@dataclass(frozen=True, slots=True)
class Corpus:
    """What `momaserve.training.dictionary.build` wrote; pictures are uint8 [N, S, S, 3]."""

    items: list[Item]
    pictures: np.ndarray[Any, Any]
    glosses: list[tuple[str, str]]

    @classmethod
    def load(cls, directory: Path) -> Corpus:
        """Raises DataError when the directory does not hold a built dictionary."""
        try:
            lines = (directory / "items.jsonl").read_text(encoding="utf-8").splitlines()
            items = [Item(**json.loads(line)) for line in lines]
            pictures = np.load(directory / "glyphs.npy", mmap_mode="r", allow_pickle=False)
            lines = (directory / "glosses.jsonl").read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{directory} holds no dictionary ({error}); make it with "
                f"`python -m momaserve.training.dictionary.build --out {directory}`"
            ) from error
        glosses = [(entry["word"], entry["gloss"]) for entry in map(json.loads, lines)]
        return cls(items, pictures, glosses)

    def select(self, kinds: frozenset[str], split: str) -> list[Item]:
        """Items of some kinds in one split, in order of id."""
        return [item for item in self.items if item.kind in kinds and item.split == split]


def byte_level_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` ids: SPECIAL_TOKENS, all bytes, then what `texts` merge.

    The texts must be valid Unicode; a lone surrogate makes the library fail.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_text_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Byte-level BPE over names, phrases, keywords and glosses; special tokens come first."""
    wrappers = [wrap(wrapper, "") for wrapper in (*DRAW_WRAPPERS, *GLOSS_WRAPPERS)]
    texts = [*_QUESTIONS, *wrappers] * 50
    for item in corpus.items:
        texts += [item.name, f"a {item.name}", ", ".join(item.keywords)]
        texts += item.phrases
    for word, gloss in corpus.glosses:
        texts += [word, f"define {word}", gloss]
    return byte_level_bpe(texts, vocab_size)
