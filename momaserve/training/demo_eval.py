"""Quality of a demo checkpoint: does a name give its picture, and a picture its name?

Everything goes through the engine as a user would, one try each, with the checkpoint's own
sampling. A picture counts as right when the nearest of all rendered pictures, by mean squared
difference of pixels, is the named one (or one with the very same pixels).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from momaserve.errors import DataError
from momaserve.llm import LLM
from momaserve.sampling import Distribution, OutputMode
from momaserve.training.dictionary.corpus import Corpus
from momaserve.training.dictionary.item import Item, split_tone
from momaserve.training.dictionary.plain_words import PLAIN_WORDS, accepts

_BLANK_STD = 4.0
"""A picture whose pixels vary by less than this (of 255) shows nothing."""
_REMEASURED = 64
"""Pictures near a drawn one that are compared with it exactly, at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """Shares are between 0 and 1."""

    num_samples: int
    nearest_picture: float
    """Name to picture: the nearest picture is the named one."""
    in_nearest_5: float
    blank_pictures: int
    exact_name: float
    """Picture to name: the first line is the exact name."""
    name_up_to_tone: float
    round_trip: float
    """Name to picture to the same name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordScores:
    """How many plain words, none of which training ever asked for, find a fitting picture."""

    num_words: int
    found: float
    """Share of words whose nearest picture is one that a fair person accepts."""
    missed: dict[str, str]
    """Each other word, and the name of the picture that it found."""


class PictureIndex:
    """Finds the nearest of all rendered pictures."""

    def __init__(self, corpus: Corpus) -> None:
        count = len(corpus.pictures)
        pixels: NDArray[np.float32] = np.asarray(corpus.pictures, dtype=np.float32)
        self._pixels = pixels.reshape(count, -1)
        self._norms = (self._pixels**2).sum(1)
        self._first = [
            item.id if item.duplicate_of is None else item.duplicate_of for item in corpus.items
        ]

    def nearest(self, picture: Image.Image, count: int) -> list[int]:
        """Ids of the `count` nearest pictures, best first; one id per group of duplicates."""
        flat = np.asarray(picture.convert("RGB"), dtype=np.float32).reshape(-1)
        # Sums of squares near 1e9 are rough in float32, so that pictures which hardly differ
        # would be mixed up: the best ones are measured again, exactly.
        rough = self._norms - 2 * (self._pixels @ flat)
        best = np.sort(np.argsort(rough, kind="stable")[: max(_REMEASURED, 8 * count)])
        distance = ((self._pixels[best] - flat) ** 2).sum(axis=1, dtype=np.float64)
        found: list[int] = []
        for index in best[np.argsort(distance, kind="stable")]:
            first = self._first[int(index)]
            if first not in found:
                found.append(first)
            if len(found) == count:
                break
        return found

    def identity(self, item: Item) -> int:
        """The id that stands for the item's pixels."""
        return self._first[item.id]

    def twins(self, identity: int) -> list[int]:
        """Ids of all items with these pixels."""
        return [index for index, first in enumerate(self._first) if first == identity]


def sample_items(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` items drawn without replacement; all of them where there are fewer."""
    if not items:
        raise DataError("there are no pictures to evaluate on")
    return random.Random(seed).sample(list(items), min(count, len(items)))


def score_tasks(
    llm: LLM, corpus: Corpus, index: PictureIndex, items: Sequence[Item], seed: int
) -> TaskScores:
    """Scores over `items`; request i uses the seed `seed + i`."""
    drawn = draw(llm, [item.name for item in items], seed)
    hits, near, blanks = 0, 0, 0
    for item, picture in zip(items, drawn, strict=True):
        nearest = index.nearest(picture, 5)
        hits += nearest[0] == index.identity(item)
        near += index.identity(item) in nearest
        blanks += is_blank(picture)
    pictures = [Image.fromarray(np.asarray(corpus.pictures[item.id])) for item in items]
    names = name_pictures(llm, pictures, seed)
    again = name_pictures(llm, drawn, seed)
    total = len(items)
    exact = sum(name == item.name for name, item in zip(names, items, strict=True))
    similar = sum(
        _without_tone(name) == item.base_name for name, item in zip(names, items, strict=True)
    )
    trips = sum(name == item.name for name, item in zip(again, items, strict=True))
    return TaskScores(
        num_samples=total,
        nearest_picture=hits / total,
        in_nearest_5=near / total,
        blank_pictures=blanks,
        exact_name=exact / total,
        name_up_to_tone=similar / total,
        round_trip=trips / total,
    )


def score_words(llm: LLM, corpus: Corpus, index: PictureIndex, seed: int) -> WordScores:
    """Scores of the plain words of `dictionary.plain_words`, one try each."""
    words = list(PLAIN_WORDS)
    missed: dict[str, str] = {}
    for word, picture in zip(words, draw(llm, words, seed), strict=True):
        nearest = index.twins(index.nearest(picture, 1)[0])
        if not any(accepts(word, corpus.items[id_]) for id_ in nearest):
            missed[word] = corpus.items[nearest[0]].name
    return WordScores(num_words=len(words), found=1 - len(missed) / len(words), missed=missed)


def count_greedy_blanks(llm: LLM, items: Sequence[Item]) -> int:
    """Blank pictures when each token is the likeliest one, which tends to the background."""
    greedy = Distribution(temperature=0)
    return sum(is_blank(p) for p in draw(llm, [item.name for item in items], 0, image=greedy))


def draw(llm: LLM, names: Sequence[str], seed: int, **changes: Any) -> list[Image.Image]:
    """One picture per name; `changes` are fields of SamplingParams."""
    params = [
        llm.default_params(mode=OutputMode.IMAGE, seed=seed + i, **changes)
        for i in range(len(names))
    ]
    return [
        result.choices[0].images[0]
        for result in llm.generate(list(names), params, progress="drawing")
    ]


def name_pictures(llm: LLM, pictures: Sequence[Image.Image], seed: int) -> list[str]:
    """The first line of the answer to each picture."""
    params = [
        llm.default_params(max_tokens=40, stop=("\n",), seed=seed + i) for i in range(len(pictures))
    ]
    results = llm.generate([(picture,) for picture in pictures], params, progress="naming")
    return [result.choices[0].text for result in results]


def is_blank(picture: Image.Image) -> bool:
    """Whether all pixels are nearly of one colour, whichever it is."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    return float(pixels.std(axis=(0, 1)).max()) < _BLANK_STD


def contact_sheet(
    corpus: Corpus, items: Sequence[Item], drawn: Sequence[Image.Image], columns: int = 10
) -> Image.Image:
    """Pairs of (rendered, drawn), row by row: a picture to look at."""
    size = drawn[0].width
    rows = -(-len(items) // columns)
    sheet = Image.new("RGB", (columns * (2 * size + 8), rows * (size + 8)), "white")
    for position, (item, picture) in enumerate(zip(items, drawn, strict=True)):
        left, top = position % columns * (2 * size + 8), position // columns * (size + 8)
        sheet.paste(Image.fromarray(np.asarray(corpus.pictures[item.id])), (left, top))
        sheet.paste(picture, (left + size, top))
    return sheet


def _without_tone(name: str) -> str:
    return split_tone(name)[0]
