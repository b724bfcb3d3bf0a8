"""Prompts for pictures: a function of the seed, never kept out, never another picture's."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from momaserve.errors import DataError
from momaserve.training.dictionary.item import Item
from momaserve.training.dictionary.plain_words import is_kept_out
from momaserve.training.dictionary.prompts import MAX_SHARED, Prompts
from tests.training.factory import make_item

TONE = "dark skin tone"
ITEMS = [
    make_item(0, "owl", keywords=["bird", "wise"], phrases=["barn owl", "night bird, owl"]),
    make_item(1, "pizza", keywords=["cheese", "slice"], phrases=["pizza pie"]),
    make_item(2, f"waving hand: {TONE}", keywords=[TONE, "hand", "wave"], phrases=[f"{TONE} wave"]),
    make_item(3, "waving hand", keywords=["hand", "wave"]),
    make_item(4, "hole", keywords=[]),
    make_item(5, "stop sign", keywords=["sign", "stop", "octagonal"]),
    make_item(6, "flag: japan", keywords=["flag"], phrases=["flag of japan", "japan"], kind="flag"),
    *(make_item(7 + n, f"face {n}", keywords=["face", "smile"]) for n in range(MAX_SHARED + 2)),
]


def many(index: int, count: int = 2000, items: list[Item] = ITEMS) -> Counter[str]:
    rng = random.Random(index)
    prompts = Prompts(items)
    return Counter(prompts.draw(index, rng) for _ in range(count))


def test_prompts_are_a_function_of_the_seed() -> None:
    random.seed(1)
    first = many(0)
    random.seed(2)
    assert many(0) == first


def test_a_name_comes_alone_wrapped_in_phrases_and_with_keywords() -> None:
    prompts = many(0)
    assert prompts["owl"] / 2000 == pytest.approx(0.45, abs=0.05)
    assert {
        "draw an owl",
        "an owl",
        "show me an owl",
        "owl emoji",
        "can you draw an owl?",
        "barn owl",
        "night bird, owl",
        "wise",
        "bird, wise",
        "wise bird",
    } <= prompts.keys()
    assert "draw a night bird, owl" not in prompts


def test_a_plain_word_is_never_asked_alone() -> None:
    for index in (1, 5):
        prompts = many(index)
        assert not any(map(is_kept_out, prompts))
        assert len(prompts) > 10
    assert any("pizza" in prompt for prompt in many(1))


def test_a_kept_out_name_without_anything_else_is_an_error() -> None:
    with pytest.raises(DataError, match="'ghost' is kept out .* build the dictionary again"):
        Prompts([make_item(0, "ghost", keywords=[])])
    lonely = [make_item(0, "ghost", keywords=["creature"])]
    assert "ghost, creature" in many(0, items=lonely)
    spoken = [make_item(0, "ghost", keywords=[], phrases=["ghost soul"])]
    prompts = many(0, items=spoken)
    assert "ghost soul" in prompts
    assert all("ghost" in prompt and not is_kept_out(prompt) for prompt in prompts)


def test_adjectives_say_nothing_and_are_no_other_name() -> None:
    items = [
        *ITEMS,
        make_item(99, "big owl", keywords=[]),
        make_item(100, "x", keywords=["one owl"]),
    ]
    prompts = many(0, items=items)
    assert {"cute owl", "little owl", "funny wise"} <= prompts.keys()
    assert not prompts.keys() & {"big owl", "one owl"}
    assert {"cute pizza", "little pizza"} <= many(1).keys()  # kept out alone, not in company
    assert not any(prompt.startswith(("cute", "little")) for prompt in many(2))


def test_a_tone_is_always_said() -> None:
    assert all(TONE in prompt or "dark skin" in prompt for prompt in many(2))
    assert not any("tone" in prompt for prompt in many(3))


def test_an_item_with_nothing_but_a_name() -> None:
    prompts = many(4)
    assert all("hole" in prompt for prompt in prompts)
    assert prompts["hole"] > 1000


def test_keywords_that_many_share_do_not_stand_for_one() -> None:
    prompts = many(7)
    assert not prompts.keys() & {"face", "smile", "face, smile", "smile face", "smile, face"}
    assert any(set(prompt.split(", ")) == {"face", "smile", "0"} for prompt in prompts)


def test_names_with_a_colon_are_wrapped_as_phrases_too() -> None:
    assert {"draw a flag of japan", "show me a japan"} & many(6).keys()
