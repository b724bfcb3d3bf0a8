"""The rows that a report is measured on: the illustrated dictionary, or a user's documents.

Rows are cut and packed as training did it. `train` rows have documents like those that training
learnt (of a user's data: the very ones), `held_out` rows hold what training left out.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from momaserve.errors import ConfigError, DataError
from momaserve.models.config import ModelConfig
from momaserve.models.image_tokenizer import ImageAutoencoder
from momaserve.tokens.text import TextTokenizer
from momaserve.training.data import VALIDATION_SEED, open_corpus
from momaserve.training.demo import (
    demo_data,
    encode_pictures,
    load_image_tokenizer,
    rows_of_step,
    select_items,
)
from momaserve.training.dictionary.corpus import Corpus
from momaserve.training.documents.data import DocumentData
from momaserve.training.documents.pictures import square
from momaserve.training.documents.reader import read_records
from momaserve.training.documents.record import Skipped, UnusableError
from momaserve.training.documents.settings import DocumentSettings
from momaserve.training.packing import PackedRows, RowsOfStep
from momaserve.training.recipe import Recipe

DEMO = "demo"
DEMO_FOLDER = Path("build/dictionary")
SPLITS = ("train", "held_out")
_FRESH_SEED = 2 * VALIDATION_SEED
"""Is added for rows that routers are calibrated or fitted on: the report scores none of them."""
_BATCH_PICTURES = 64

Pixels = np.ndarray[Any, Any]
PictureFinder = Callable[[set[tuple[int, ...]]], Mapping[tuple[int, ...], Pixels]]
"""Image token ids of pictures -> uint8 [S, S, 3] of those whose pixels are known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabData:
    """Opened data. All of it is a pure function of the arguments and what lies on the disk."""

    config: ModelConfig
    splits: Mapping[str, Sequence[PackedRows]]
    """Batches by name; a split without any is left out."""
    fresh_rows: RowsOfStep
    """More training rows, of steps that are not in `splits`."""
    short_rows: RowsOfStep
    """Training rows without long conversations: documents that can be taken apart."""
    row_length: int
    num_rows: int
    text: TextTokenizer
    pictures: ImageAutoencoder | None
    find_pictures: PictureFinder
    summary: str
    dictionary: tuple[Recipe, Corpus] | None = None
    """What tasks are scored on; None for a user's documents."""

    def fingerprint(self) -> str:
        """Hash of every scored batch."""
        digest = hashlib.sha256()
        for name, batches in self.splits.items():
            for rows in batches:
                digest.update(f"{name}/{tuple(rows.token_ids.shape)}/".encode())
                for tensor in (rows.token_ids, rows.targets, rows.positions):
                    digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def open_source(
    data: str, recipe_name: str | None, checkpoint: Path, out: Path, *, num_batches: int, seed: int
) -> LabData:
    """Open data for a checkpoint.

    Args:
        data: "demo", a folder that holds a built dictionary, or a user's folder or `.jsonl`.
        recipe_name: what the checkpoint was trained by; None is "demo", or "documents".
        out: the report's folder; encoded documents are kept there.

    Raises:
        ConfigError: the recipe is for other data, or does not fit the checkpoint.
        DataError: no such data, or none that the checkpoint can read.
    """
    config = ModelConfig.load(checkpoint)
    path = DEMO_FOLDER if data == DEMO else Path(data)
    is_dictionary = data == DEMO or all((path / n).exists() for n in ("items.jsonl", "glyphs.npy"))
    recipe = Recipe.load(recipe_name or ("demo" if is_dictionary else "documents"))
    if isinstance(recipe.data, DocumentSettings) == is_dictionary:
        kind = "the dictionary" if is_dictionary else "documents of a user"
        raise ConfigError(f"{path} holds {kind}, which recipe {recipe_name!r} is not for")
    open_it = _open_dictionary if is_dictionary else _open_documents
    return open_it(recipe, config, path, checkpoint, out, num_batches, seed)


def _open_dictionary(
    recipe: Recipe,
    config: ModelConfig,
    path: Path,
    checkpoint: Path,
    out: Path,
    num_batches: int,
    seed: int,
) -> LabData:
    if not (checkpoint / "tokenizer.json").exists() or config.image is None:
        raise DataError(f"{checkpoint} has no words or no pictures: it knows no dictionary")
    corpus = open_corpus(path, recipe)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    pictures = load_image_tokenizer(checkpoint / "image_tokenizer")
    opened = {
        split: demo_data(recipe, corpus, checkpoint / "image_tokenizer", tokenizer, split)
        for split in SPLITS
        if select_items(corpus, recipe.dictionary, split)
    }
    for each in opened.values():
        same = ("vocab_size", "image", "bos_token_id", "pad_token_id", "eos_token_id")
        wrong = [name for name in same if getattr(each.config, name) != getattr(config, name)]
        if wrong:
            raise ConfigError(f"the recipe gives other {', '.join(wrong)} than {checkpoint} has")
    training = recipe.pretrain
    scored = replace(training, seed=training.seed + VALIDATION_SEED + seed)
    fresh = replace(training, seed=training.seed + _FRESH_SEED + seed)

    def rows(split: str, step: int) -> PackedRows:
        return rows_of_step(scored, opened[split].packer, opened[split].tasks.draw, step)

    train = opened["train"]
    known = {
        tuple(codes[0]): item.id
        for each in opened.values()
        for item, codes in zip(each.tasks.items, each.tasks.codes, strict=True)
    }
    return LabData(
        config=config,
        splits={split: [rows(split, step) for step in range(num_batches)] for split in opened},
        fresh_rows=lambda step: rows_of_step(fresh, train.packer, train.tasks.draw, step),
        short_rows=lambda step: rows_of_step(
            replace(scored, conversation_every=0), train.packer, train.tasks.draw, step
        ),
        row_length=training.row_length,
        num_rows=training.num_rows,
        text=_text_tokenizer(checkpoint, config),
        pictures=pictures,
        find_pictures=lambda wanted: {
            codes: np.asarray(corpus.pictures[known[codes]]) for codes in wanted & known.keys()
        },
        summary=", ".join(f"{len(each.tasks.items):,} {name}" for name, each in opened.items())
        + " pictures of the dictionary",
        dictionary=(recipe, corpus),
    )


def _open_documents(
    recipe: Recipe,
    config: ModelConfig,
    path: Path,
    checkpoint: Path,
    out: Path,
    num_batches: int,
    seed: int,
) -> LabData:
    settings = recipe.data
    assert isinstance(settings, DocumentSettings)
    if not (checkpoint / "tokenizer.json").exists():
        raise DataError(f"{checkpoint} has no tokenizer.json: it cannot read documents")
    settings = replace(
        settings,
        text_vocab_size=config.vocab_size if config.image is None else config.image.first_token_id,
        row_length=min(settings.row_length, config.max_position_embeddings),
        max_validation_batches=num_batches,
    )
    folder = None if config.image is None else checkpoint / "image_tokenizer"
    here = out / "data"
    here.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(checkpoint / "tokenizer.json", here / "tokenizer.json")
    documents = DocumentData.open(path, settings, folder, here)
    pictures = None if folder is None else load_image_tokenizer(folder)

    def find(wanted: set[tuple[int, ...]]) -> Mapping[tuple[int, ...], Pixels]:
        if pictures is None or config.image is None:
            return {}
        return _find_in_records(path, settings.seed, pictures, config.image.first_token_id, wanted)

    first = seed * 10 * num_batches  # another seed scores other steps
    batches = {
        "train": [documents.rows_of_step(first + step) for step in range(num_batches)],
        "held_out": documents.validation_batches(),
    }
    return LabData(
        config=config,
        splits={name: rows for name, rows in batches.items() if rows},
        fresh_rows=lambda step: documents.rows_of_step(first + num_batches + step),
        short_rows=lambda step: documents.rows_of_step(first + step),
        row_length=settings.row_length,
        num_rows=settings.num_rows,
        text=_text_tokenizer(checkpoint, config),
        pictures=pictures,
        find_pictures=find,
        summary=documents.summary,
    )


def _text_tokenizer(checkpoint: Path, config: ModelConfig) -> TextTokenizer:
    controls = {config.bos_token_id, config.pad_token_id, config.eos_token_id}
    if config.image is not None:
        controls |= {config.image.begin_token_id, config.image.end_token_id}
    return TextTokenizer.load(checkpoint / "tokenizer.json", control_ids=controls)


def _find_in_records(
    path: Path,
    seed: int,
    model: ImageAutoencoder,
    first_token_id: int,
    wanted: set[tuple[int, ...]],
) -> Mapping[tuple[int, ...], Pixels]:
    """Reads a data set until the pictures of all wanted codes were met."""
    found: dict[tuple[int, ...], Pixels] = {}
    for pixels in _in_batches(_pictures_of(path, seed, model.config.image_size)):
        ids = encode_pictures(model, np.stack(pixels), first_token_id)
        for codes, picture in zip(map(tuple, ids), pixels, strict=True):
            if codes in wanted:
                found.setdefault(codes, picture)
        if len(found) == len(wanted):
            break
    return found


def _pictures_of(path: Path, seed: int, side: int) -> Iterator[Pixels]:
    for record in read_records(path, seed):
        if isinstance(record, Skipped):
            continue
        for picture in record.pictures:
            try:
                yield square(picture, side)
            except UnusableError:
                continue  # the encoder left it out too


def _in_batches(pictures: Iterator[Pixels]) -> Iterator[list[Pixels]]:
    batch: list[Pixels] = []
    for picture in pictures:
        batch.append(picture)
        if len(batch) == _BATCH_PICTURES:
            yield batch
            batch = []
    if batch:
        yield batch
