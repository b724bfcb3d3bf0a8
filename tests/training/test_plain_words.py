"""The kept-out test words: what they accept, and that no wrapper hides them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from momaserve.training.dictionary.plain_words import PLAIN_WORDS, accepts, is_kept_out, words_of
from momaserve.training.dictionary.taste import is_fit_word
from momaserve.training.dictionary.wrappers import DRAW_WRAPPERS, GLOSS_WRAPPERS, unwrap, wrap
from tests.training.factory import make_item


def test_there_are_100_words_that_are_told_apart() -> None:
    assert len(PLAIN_WORDS) == 100
    assert len({words_of(word) for word in PLAIN_WORDS}) == 100
    for word, names in PLAIN_WORDS.items():
        assert is_fit_word(word)
        assert names
        assert len(set(names)) == len(names)
        assert all(names), word


def test_some_words_are_in_no_name_that_they_accept() -> None:
    foreign = [
        word
        for word, names in PLAIN_WORDS.items()
        if not any(re.search(rf"\b{word}\b", name) for name in names)
    ]
    assert 25 <= len(foreign) <= 35
    assert {"puppy", "bunny", "auto"} <= set(foreign)


@pytest.mark.parametrize("wrapper", DRAW_WRAPPERS)
@pytest.mark.parametrize("word", ["pizza", "ice cream", "elephant"])
def test_a_wrapped_word_is_kept_out(word: str, wrapper: str) -> None:
    prompt = wrap(wrapper, word)
    assert unwrap(prompt) == word
    assert is_kept_out(prompt)
    assert is_kept_out(f" {prompt.upper()}! ")


@pytest.mark.parametrize(
    "prompt",
    ["Pizza", "the pizza.", "“pizza”", "Draw me a pizza, please!", "sign, stop", "face: happy",
     "the picture of a pizza", "draw a picture of an egg"],
)  # fmt: skip
def test_other_ways_to_put_it_are_kept_out(prompt: str) -> None:
    assert is_kept_out(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "pizza, cheese",
        "pizza food",
        "red apple",
        "flag: japan",
        "please",
        "draw",
        "",
        "*",
        "pizzas",
    ],
)
def test_related_prompts_are_not_kept_out(prompt: str) -> None:
    assert not is_kept_out(prompt)


@pytest.mark.parametrize("wrapper", GLOSS_WRAPPERS)
def test_asking_for_a_gloss_is_another_task(wrapper: str) -> None:
    assert not is_kept_out(wrap(wrapper, "pizza"))


def test_skin_tone_and_gender_do_not_matter() -> None:
    swimmer = make_item(0, "man swimming: dark skin tone")
    assert accepts("swimming", swimmer)
    assert accepts("teacher", make_item(1, "woman teacher"))
    assert accepts("flower", make_item(2, "rose"))
    assert not accepts("swimming", replace(swimmer, base_name="man running"))
    assert not accepts("fish", make_item(3, "man"))
