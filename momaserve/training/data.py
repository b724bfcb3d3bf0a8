"""What a recipe's `[data]` gives a trainer: rows for every step, from one of two sources.

`source = "dictionary"` is the demo's illustrated dictionary, made first where it is absent;
`source = "documents"` is a user's own folder or `.jsonl` file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from momaserve.errors import ConfigError, DataError
from momaserve.models.config import ModelConfig
from momaserve.training.demo import (
    CHAT_TEMPLATE,
    demo_data,
    rows_of_step,
    select_items,
    text_tokenizer,
)
from momaserve.training.dictionary.build import build
from momaserve.training.dictionary.corpus import Corpus
from momaserve.training.documents.data import DocumentData
from momaserve.training.documents.settings import DocumentSettings
from momaserve.training.packing import PackedRows, RowsOfStep
from momaserve.training.recipe import Recipe

VALIDATION_BATCHES = 4
"""Of the dictionary: pictures that were held out, and any words."""
VALIDATION_SEED = 1000
"""Is added to the recipe's: no training step draws these documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """Opened data. All of it is a pure function of the recipe and what lies on the disk."""

    config: ModelConfig
    """Of the model: the recipe's `[model]` with the ids that the tokenizers have."""
    rows_of_step: RowsOfStep
    validation_batches: Callable[[], list[PackedRows]]
    """Rows that are never trained on; none where nothing was held out."""
    chat_template: str
    summary: str
    """For people."""
    fingerprint: Mapping[str, str] | None
    """Hashes of what it was made of, for run.json."""


def open_corpus(directory: Path, recipe: Recipe) -> Corpus:
    """The dictionary in `directory`, made first where it is absent.

    Raises:
        DataError: the Debian packages that it is made from are missing, or its pictures have
            another size than the recipe's.
    """
    size = recipe.picture_size
    if not (directory / "items.jsonl").exists():
        print(f"making the dictionary in {directory}", file=sys.stderr)
        build(directory, size)
    corpus = Corpus.load(directory)
    found = corpus.pictures.shape[1]
    if found != size:
        raise DataError(
            f"the pictures in {directory} have {found} pixels a side, the recipe's {size}: "
            "give another directory, and the dictionary is made there"
        )
    return corpus


def open_data(
    recipe: Recipe, path: Path, image_tokenizer: Path | None, out: Path, *, seed: int | None = None
) -> TrainingData:
    """Open the data of a recipe for the run that writes the checkpoint `out`.

    Args:
        image_tokenizer: directory of a trained one; None for a model of text alone.
        out: its `tokenizer.json` is used, and made first where it is absent.
        seed: of the dictionary's steps, if not the recipe's. Documents keep theirs, which also
            says what is held out.

    Raises:
        ConfigError: recipe and arguments do not go together, or rows that the context is too
            short for.
        DataError: there is no such data, or nothing to learn from in it.
    """
    _check_context(recipe)
    if isinstance(recipe.data, DocumentSettings):
        return _documents(recipe, recipe.data, path, image_tokenizer, out)
    return _dictionary(recipe, path, image_tokenizer, out, seed)


def _documents(
    recipe: Recipe,
    settings: DocumentSettings,
    path: Path,
    image_tokenizer: Path | None,
    out: Path,
) -> TrainingData:
    if image_tokenizer is None and recipe.image_tokenizer is not None:
        raise ConfigError(
            "the recipe has a section [image_tokenizer]: make one with "
            "`momaserve train-image-tokenizer` and give it as --image-tokenizer"
        )
    documents = DocumentData.open(path, settings, image_tokenizer, out)
    ids = {"model_type": "moma", "format_version": 1, **documents.config_ids}
    return TrainingData(
        config=ModelConfig.from_dict({**recipe.model, **ids}),
        rows_of_step=documents.rows_of_step,
        validation_batches=documents.validation_batches,
        chat_template=documents.chat_template,
        summary=documents.summary,
        fingerprint=documents.fingerprint,
    )


def _dictionary(
    recipe: Recipe, path: Path, image_tokenizer: Path | None, out: Path, seed: int | None
) -> TrainingData:
    if image_tokenizer is None:
        raise ConfigError("the dictionary has pictures: give --image-tokenizer")
    corpus = open_corpus(path, recipe)
    tokenizer: Tokenizer = text_tokenizer(recipe, corpus, out / "tokenizer.json")
    data = demo_data(recipe, corpus, image_tokenizer, tokenizer, "train")
    training = recipe.pretrain
    if seed is not None:
        training = replace(training, seed=seed)

    def held_out() -> list[PackedRows]:
        if not select_items(corpus, recipe.dictionary, "held_out"):
            return []
        others = demo_data(recipe, corpus, image_tokenizer, tokenizer, "held_out")
        fresh = replace(training, seed=training.seed + VALIDATION_SEED, conversation_every=0)
        draw = others.tasks.draw
        return [rows_of_step(fresh, others.packer, draw, i) for i in range(VALIDATION_BATCHES)]

    return TrainingData(
        config=data.config,
        rows_of_step=lambda step: rows_of_step(training, data.packer, data.tasks.draw, step),
        validation_batches=held_out,
        chat_template=CHAT_TEMPLATE,
        summary=f"{len(data.tasks.items):,} pictures and {len(corpus.glosses):,} words",
        fingerprint=None,
    )


def _check_context(recipe: Recipe) -> None:
    """Raises ConfigError for rows longer than the model's context, before data is prepared."""
    training, limit = recipe.pretrain, recipe.model.get("max_position_embeddings")
    longest = training.row_length
    name = "row_length"
    if not isinstance(recipe.data, DocumentSettings) and training.conversation_every:
        longest, name = longest * training.num_rows, "num_rows x row_length (a conversation)"
    if type(limit) is int and longest > limit:
        raise ConfigError(f"{name} is {longest}, but max_position_embeddings is {limit}")
