"""Builds the dictionary's files: `python -m momaserve.training.dictionary.build --out DIR`.

Writes DIR/items.jsonl, DIR/glyphs.npy (uint8 [N, size, size, 3], row = item id) and
DIR/glosses.jsonl, the same bytes each time for the same packages.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np

from momaserve.errors import DataError
from momaserve.training.dictionary.cldr import Annotation, read_annotations, read_other_names
from momaserve.training.dictionary.glyphs import GlyphRenderer, Pixels
from momaserve.training.dictionary.item import Item, classify, split_tone
from momaserve.training.dictionary.phrases import PhraseFinder
from momaserve.training.dictionary.split import hold_out
from momaserve.training.dictionary.wordnet import WordNet
from momaserve.training.dictionary.words import NUM_WORDS, choose_words


def draw_items(
    annotations: Iterable[Annotation], render: Callable[[str], Pixels | None]
) -> tuple[list[Item], list[Pixels]]:
    """Returns an item and a picture for each annotation that `render` can draw."""
    items: list[Item] = []
    pictures: list[Pixels] = []
    first_with: dict[bytes, int] = {}
    for annotation in annotations:
        picture = render(annotation.emoji)
        if picture is None:
            continue
        base_name, tone = split_tone(annotation.name)
        kind = classify(annotation.emoji)
        first = first_with.setdefault(picture.tobytes(), len(items))
        items.append(
            Item(
                id=len(items),
                emoji=annotation.emoji,
                name=annotation.name,
                keywords=list(annotation.keywords),
                kind=kind,
                tone=tone,
                base_name=base_name,
                split="train",
                duplicate_of=None if first == len(items) else first,
            )
        )
        pictures.append(picture)
    return hold_out(items), pictures


def explain_words(items: Sequence[Item], wordnet: WordNet) -> dict[str, str]:
    """Returns about `NUM_WORDS` glosses for the words of the items' names and keywords."""
    glosses: dict[str, str] = {}
    names = {item.name for item in items}
    for word in choose_words(items, wordnet, num_words=2 * NUM_WORDS):
        gloss = wordnet.gloss(word, is_picture=word in names)
        if gloss is not None:
            glosses[word] = gloss
        if len(glosses) == NUM_WORDS:
            break
    return glosses


def build(out: Path, size: int = 64) -> str:
    """Makes all files under `out` and returns a summary for people.

    Raises:
        DataError: a Debian package is missing or holds something unexpected.
    """
    renderer = GlyphRenderer(size)
    wordnet = WordNet()
    items, pictures = draw_items(read_annotations(), renderer.render)
    if not items:
        raise DataError("no emoji could be drawn")
    glosses = explain_words(items, wordnet)
    items = PhraseFinder(wordnet, read_other_names()).add_phrases(items)
    out.mkdir(parents=True, exist_ok=True)
    entries = [{"word": w, "gloss": g, "split": "train"} for w, g in glosses.items()]
    _replace(out / "glyphs.npy", lambda file: np.save(file, np.stack(pictures)))
    _replace(out / "glosses.jsonl", lambda file: _write_lines(file, entries))
    _replace(out / "items.jsonl", lambda file: _write_lines(file, map(asdict, items)))
    return summarize(items, len(glosses))


def summarize(items: Sequence[Item], num_glosses: int) -> str:
    """Returns the counts that tell whether a build is the expected one."""
    kinds = Counter(item.kind for item in items)
    held_out = Counter(item.kind for item in items if item.split == "held_out")
    num_twins = sum(item.duplicate_of is not None for item in items)
    return "\n".join([
        f"pictures: {len(items)} ({len(items) - num_twins} distinct), "
        + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()),
        f"held out: {held_out.total()}, "
        + ", ".join(f"{kind} {count}" for kind, count in held_out.most_common()),
        f"glosses: {num_glosses}",
        f"phrases: {sum(len(item.phrases) for item in items)}, "
        f"of {sum(bool(item.phrases) for item in items)} pictures",
    ])  # fmt: skip


def _replace(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Writes a file under a temporary name, then renames it: readers never see half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_lines(file: IO[bytes], entries: Iterable[Mapping[str, object]]) -> None:
    for entry in entries:
        file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")


def main() -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m momaserve.training.dictionary.build")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="picture width and height in pixels")
    options = parser.parse_args()
    try:
        print(build(options.out, options.size))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
