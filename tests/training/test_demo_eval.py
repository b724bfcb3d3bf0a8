"""Scores of a demo: the nearest picture, duplicates, blanks, and how hits are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from momaserve.errors import DataError
from momaserve.llm import LLM, ChoiceResult, RequestResult
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.training.demo_eval import (
    PictureIndex,
    contact_sheet,
    count_greedy_blanks,
    is_blank,
    sample_items,
    score_tasks,
    score_words,
)
from momaserve.training.dictionary.plain_words import PLAIN_WORDS
from tests.training.factory import make_corpus, make_item

Pixels = np.ndarray[Any, Any]
SIDE = 8


def random_pictures(count: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.asarray(pixels, dtype=np.uint8))


# --- the index -----------------------------------------------------------------------------


def test_the_nearest_comes_first() -> None:
    pictures = random_pictures(7)
    index = PictureIndex(make_corpus([f"thing {i}" for i in range(7)], pictures))
    for number in range(7):
        noisy = pictures[number].astype(int) + np.random.default_rng(1).integers(-9, 10, (8, 8, 3))
        assert index.nearest(image(noisy.clip(0, 255)), 1) == [number]
    distances = ((pictures.astype(float) - pictures[3].astype(float)) ** 2).sum((1, 2, 3))
    assert index.nearest(image(pictures[3]), 7) == np.argsort(distances, kind="stable").tolist()
    assert len(index.nearest(image(pictures[3]), 100)) == 7


def test_pictures_that_hardly_differ_are_told_apart() -> None:
    """Bright and large, so that sums of squares swamp the difference in float32."""
    bright = np.random.default_rng(3).integers(230, 256, (64, 64, 3), dtype=np.uint8)
    pictures = np.repeat(bright[None], 40, axis=0)
    for number in range(40):
        pictures[number, number, number, 0] -= 2
    index = PictureIndex(make_corpus([f"thing {i}" for i in range(40)], pictures))
    assert [index.nearest(image(picture), 1) for picture in pictures] == [[i] for i in range(40)]


def test_duplicates_stand_for_one_picture() -> None:
    pictures = random_pictures(5)
    pictures[2] = pictures[4] = pictures[0]
    names = ["one", "two", "twin", "four", "triplet"]
    corpus = make_corpus(names, pictures, twin=0, triplet=0)
    index = PictureIndex(corpus)
    assert [index.identity(item) for item in corpus.items] == [0, 1, 0, 3, 0]
    nearest = index.nearest(image(pictures[4]), 5)
    assert nearest[0] == 0
    assert sorted(nearest) == [0, 1, 3]


def test_any_mode_of_picture_is_read() -> None:
    pictures = random_pictures(3)
    pictures[1] = pictures[1][:, :, :1]  # grey
    index = PictureIndex(make_corpus(["a", "b", "c"], pictures))
    assert index.nearest(image(pictures[1]).convert("L"), 1) == [1]
    assert index.nearest(image(pictures[2]).convert("RGBA"), 1) == [2]


# --- small parts ---------------------------------------------------------------------------


def test_blank_is_what_shows_nothing() -> None:
    blank = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    assert is_blank(image(blank))
    assert is_blank(image(blank - np.random.default_rng(0).integers(0, 6, blank.shape)))
    red = blank.copy()
    red[:, :, 1:] = 0
    assert is_blank(image(red))  # of one colour, though its channels differ
    drawn = blank.copy()
    drawn[2:4, 2:4] = 0
    assert not is_blank(image(drawn))


def test_samples_are_a_function_of_the_seed() -> None:
    items = [make_item(i, f"thing {i}") for i in range(50)]
    assert sample_items(items, 10, 1) == sample_items(tuple(items), 10, 1)
    assert sample_items(items, 10, 1) != sample_items(items, 10, 2)
    assert len({item.id for item in sample_items(items, 10, 1)}) == 10
    assert sorted(item.id for item in sample_items(items, 99, 1)) == list(range(50))
    with pytest.raises(DataError, match="no pictures to evaluate on"):
        sample_items([], 3, 0)


def test_a_contact_sheet_has_pairs_in_rows() -> None:
    pictures = random_pictures(3)
    corpus = make_corpus(["a", "b", "c"], pictures)
    drawn = [image(255 - picture) for picture in pictures]
    sheet = np.asarray(contact_sheet(corpus, corpus.items, drawn, columns=2))
    assert sheet.shape == (2 * (SIDE + 8), 2 * (2 * SIDE + 8), 3)
    left = 2 * SIDE + 8
    assert np.array_equal(sheet[:SIDE, left : left + SIDE], pictures[1])
    assert np.array_equal(sheet[SIDE + 8 : 2 * SIDE + 8, SIDE : 2 * SIDE], 255 - pictures[2])


# --- scores --------------------------------------------------------------------------------


class FakeLLM:
    """Draws and names by table; remembers what it was asked."""

    def __init__(self, drawings: dict[str, Pixels], names: dict[bytes, str]) -> None:
        self.drawings = drawings
        self.names = names
        self.params: list[list[SamplingParams]] = []

    def as_llm(self) -> LLM:
        return cast(LLM, self)

    def default_params(self, **changes: Any) -> SamplingParams:
        return SamplingParams(**changes)

    def generate(
        self, prompts: Sequence[Any], params: Sequence[SamplingParams], *, progress: str | None
    ) -> list[RequestResult]:
        self.params.append(list(params))
        assert len(prompts) == len(params)
        return [RequestResult((0,), [self._answer(prompt)]) for prompt in prompts]

    def _answer(self, prompt: Any) -> ChoiceResult:
        if isinstance(prompt, str):
            return ChoiceResult(parts=[image(self.drawings[prompt])])
        (picture,) = prompt
        return ChoiceResult(parts=[self.names[picture.tobytes()]])


def test_scores_by_hand() -> None:
    """Of four items: a is right, b draws its twin, c draws a, d draws nothing and misnames."""
    pictures = random_pictures(9)
    pictures[4] = pictures[1]
    names = ["a", "b", "man: light skin tone", "d", "twin", "f", "g", "h", "i"]
    corpus = make_corpus(names, pictures, twin=1)
    items = corpus.items[:4]
    blank = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    drawings = dict(zip(names[:4], [pictures[0], pictures[4], pictures[0], blank], strict=True))
    answers = {
        pictures[0].tobytes(): "a",
        pictures[1].tobytes(): "b",
        pictures[2].tobytes(): "man: dark skin tone",
        pictures[3].tobytes(): "a",
        blank.tobytes(): "d",
    }
    llm = FakeLLM(drawings, answers)
    index = PictureIndex(corpus)
    scores = score_tasks(llm.as_llm(), corpus, index, items, seed=7)
    assert scores.num_samples == 4
    assert scores.nearest_picture == 2 / 4
    nearest = [index.nearest(image(drawings[name]), 5) for name in names[:4]]
    assert scores.in_nearest_5 == sum(i in near for i, near in enumerate(nearest)) / 4
    assert scores.blank_pictures == 1
    assert scores.exact_name == 2 / 4
    assert scores.name_up_to_tone == 3 / 4
    assert scores.round_trip == 3 / 4  # a, b by its twin, and the blank that is called d
    drawing, naming, again = llm.params
    assert [params.seed for params in drawing] == [7, 8, 9, 10]
    assert all(params.mode is OutputMode.IMAGE for params in drawing)
    assert [params.seed for params in naming] == [params.seed for params in again] == [7, 8, 9, 10]
    assert all(params.stop == ("\n",) for params in naming)


def test_words_are_right_if_any_twin_of_the_nearest_picture_is_accepted() -> None:
    """Every word draws the tulip's twin, but for one that draws a chair."""
    pictures = random_pictures(3)
    pictures[1] = pictures[0]
    corpus = make_corpus(["garden", "tulip", "chair"], pictures, tulip=0)
    drawings = dict.fromkeys(PLAIN_WORDS, pictures[1]) | {"flower": pictures[1]}
    drawings["rose"] = pictures[2]
    llm = FakeLLM(drawings, {})
    scores = score_words(llm.as_llm(), corpus, PictureIndex(corpus), seed=3)
    assert scores.num_words == 100
    assert "flower" not in scores.missed
    assert scores.missed["rose"] == "chair"
    assert scores.missed["dog"] == "garden"
    assert scores.found == pytest.approx(1 - len(scores.missed) / 100)
    assert [params.seed for params in llm.params[0]] == list(range(3, 103))


def test_greedy_blanks_are_counted() -> None:
    blank = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    pictures = random_pictures(2)
    corpus = make_corpus(["a", "b"], pictures)
    llm = FakeLLM({"a": blank, "b": pictures[1]}, {})
    assert count_greedy_blanks(llm.as_llm(), corpus.items) == 1
    assert all(params.image.temperature == 0 for params in llm.params[0])
