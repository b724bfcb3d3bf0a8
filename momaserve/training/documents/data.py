"""The one thing that a trainer needs to know about a user's data: `DocumentData`."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tqdm import tqdm

from momaserve.errors import DataError
from momaserve.models.image_tokenizer import ImageAutoencoder
from momaserve.training.demo import load_image_tokenizer
from momaserve.training.documents.dataset import (
    EncodedDocuments,
    data_fingerprint,
    files_fingerprint,
    validation_mask,
)
from momaserve.training.documents.document import Document
from momaserve.training.documents.encode import Encoder
from momaserve.training.documents.order import DocumentOrder, first_fit, pack
from momaserve.training.documents.record import Skipped
from momaserve.training.documents.settings import DocumentSettings
from momaserve.training.documents.vocabulary import (
    Vocabulary,
    make_text_tokenizer,
    template_source,
)
from momaserve.training.packing import PackedRows
from momaserve.training.run import write_atomically

TOKENIZER_FILE = "tokenizer.json"
DOCUMENTS_FILE = "run/documents.safetensors"
_FIXED_SETTINGS = sorted({f.name for f in fields(DocumentSettings)} - {"max_validation_batches"})
"""What a resumed run may not change: documents, split or order depend on it."""


class DocumentData:
    """A data set of a user, encoded, split and put in order.

    A trainer opens it with `open`, prints `summary`, builds its model's configuration from
    `config_ids`, writes `chat_template` into the checkpoint, keeps `fingerprint` in `run.json`,
    and asks for `rows_of_step(step)` and now and then for `validation_batches()`. It stores
    nothing for the sake of the data: any step can be asked for at any time.
    """

    def __init__(
        self,
        documents: EncodedDocuments,
        vocabulary: Vocabulary,
        settings: DocumentSettings,
        fingerprint: Mapping[str, str],
    ) -> None:
        """Raises DataError when the documents are too few to be split."""
        self.settings = settings
        self.vocabulary = vocabulary
        self.documents = documents
        self.fingerprint = dict(fingerprint)
        """Hashes of the data, the tokenizers and the settings that the documents depend on."""
        if not len(documents.keys):
            raise DataError(f"the data holds nothing to learn from\n{documents.summary}")
        is_validation = validation_mask(documents.keys, settings.validation_share, settings.seed)
        self.training_numbers = np.flatnonzero(~is_validation)
        self.validation_numbers = np.flatnonzero(is_validation)
        self.order = DocumentOrder(
            documents.lengths[self.training_numbers],
            row_length=settings.row_length,
            num_rows=settings.num_rows,
            seed=settings.seed,
        )

    @classmethod
    def open(
        cls, path: Path, settings: DocumentSettings, image_tokenizer: Path | None, out: Path
    ) -> DocumentData:
        """Open a data set for the run in `out`.

        The text tokenizer is `out/tokenizer.json`, trained on the data's text and written there
        if it does not exist. The encoded documents are kept in `out/run/documents.safetensors`;
        a later `open` takes them from there, after it has read the data again to see that it is
        the same. Records that cannot be used are skipped and counted in `summary`.

        Args:
            path: a `.jsonl` file or a folder, see `read_records`.
            image_tokenizer: directory of a trained one; None for a model of text alone, which
                skips records with pictures.
            out: the checkpoint that the run writes.

        Raises:
            DataError: no data set at `path`; nothing usable in it; broken tokenizers; or `out`
                holds documents of other data, tokenizers or settings.
            CheckpointError: the image tokenizer's config.json is missing or broken.
        """
        tokenizer_path = out / TOKENIZER_FILE
        definition = (
            _read(tokenizer_path)
            if tokenizer_path.exists()
            else make_text_tokenizer(path, settings.text_vocab_size)
        )
        model = None if image_tokenizer is None else _load_image_tokenizer(image_tokenizer)
        vocabulary = Vocabulary.parse(
            definition, settings.text_vocab_size, None if model is None else model.config
        )
        fingerprint = {
            "data": data_fingerprint(path, settings.seed),
            "text tokenizer": hashlib.sha256(definition.encode()).hexdigest(),
            "image tokenizer": _image_tokenizer_fingerprint(image_tokenizer),
            **{name: str(getattr(settings, name)) for name in _FIXED_SETTINGS},
        }
        stored = out / DOCUMENTS_FILE
        if stored.exists():
            documents = EncodedDocuments.load(stored, fingerprint)
        else:
            encoder = Encoder(
                vocabulary, model, row_length=settings.row_length, split_long=settings.split_long
            )
            encoded = _with_progress(encoder.encode(path, settings.seed))
            documents = EncodedDocuments.collect(encoded, vocabulary.tokens_per_image)
        data = cls(documents, vocabulary, settings, fingerprint)
        # Only now: a data set that was refused must leave no tokenizer for its successor.
        out.mkdir(parents=True, exist_ok=True)
        if not tokenizer_path.exists():
            write_atomically(tokenizer_path, definition)
        if not stored.exists():
            documents.save(stored, fingerprint)
        return data

    @property
    def text_tokenizer(self) -> Tokenizer:
        return self.vocabulary.tokenizer

    @property
    def config_ids(self) -> dict[str, Any]:
        """The keys of `config.json` that follow from the tokenizers: vocab_size, bos_token_id,
        pad_token_id, eos_token_id and image (None without an image tokenizer)."""
        return self.vocabulary.config_ids()

    @property
    def chat_template(self) -> str:
        """What `chat_template.jinja` of the checkpoint must be, so that prompts are served as the
        documents begin: with separators if the data has conversations, else as plain text."""
        return template_source(self.documents.summary.num_chats)

    @property
    def summary(self) -> str:
        """Lines for people: documents, tokens, what was skipped and why, the split, an epoch."""
        rows = self.order.rows_of_epoch(0)
        num_tokens = int(self.order.lengths.sum())
        fill = num_tokens / (len(rows) * self.settings.row_length)
        return (
            f"{self.documents.summary}\n"
            f"split      {len(self.training_numbers):,} documents to train on, "
            f"{len(self.validation_numbers):,} to validate\n"
            f"an epoch   {len(rows):,} rows ({fill:.0%} full), "
            f"{len(rows) / self.settings.num_rows:,.1f} steps"
        )

    def rows_of_step(self, step: int) -> PackedRows:
        """The `num_rows` rows of a step; the same whenever it is asked for."""
        rows = self.order.documents_of_step(step)
        return self._pack([self.training_numbers[row].tolist() for row in rows])

    def validation_batches(self) -> list[PackedRows]:
        """Batches of at most `num_rows` rows of documents that are never trained on.

        Always the same ones, `max_validation_batches` at most.
        """
        return self._validation_batches

    @cached_property
    def _validation_batches(self) -> list[PackedRows]:
        numbers = self.validation_numbers
        rows = first_fit(self.documents.lengths[numbers].tolist(), self.settings.row_length)
        size, most = self.settings.num_rows, self.settings.max_validation_batches
        starts = range(0, len(rows), size)[:most]
        batches = (rows[start : start + size] for start in starts)
        return [self._pack([numbers[row].tolist() for row in batch]) for batch in batches]

    def _pack(self, rows: list[list[int]]) -> PackedRows:
        return pack(self.documents, rows, self.settings.row_length, self.vocabulary.pad)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _load_image_tokenizer(directory: Path) -> ImageAutoencoder:
    try:
        return load_image_tokenizer(directory)
    except SafetensorError as error:
        raise DataError(f"{directory} holds no image tokenizer: {error}") from error


def _image_tokenizer_fingerprint(directory: Path | None) -> str:
    if directory is None:
        return "none"
    return files_fingerprint([directory / "config.json", directory / "model.safetensors"])


def _with_progress(documents: Iterator[Document | Skipped]) -> Iterator[Document | Skipped]:
    yield from tqdm(documents, unit="document", desc="encoding", disable=not sys.stderr.isatty())
