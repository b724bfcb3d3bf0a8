"""Exchanges of the illustrated dictionary: a function of the seed, and what they hold."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from momaserve.models.config import ModelConfig
from momaserve.training.dictionary.item import Item
from momaserve.training.tasks import DictionaryTasks, Exchange, describe, draw_prompt
from tests.models.factory import make_config
from tests.training.factory import BEGIN_IMAGE, END_IMAGE, EOS, make_item

ITEMS = [
    make_item(0, "red apple", keywords=["fruit", "red", "apple"]),
    make_item(1, "owl", keywords=[]),
    make_item(2, "bee", keywords=["a", "b", "c", "d", "e", "f", "g"]),
]
CODES = [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
GLOSSES = [("owl", "a bird of the night"), ("bee", "it makes honey"), ("sky", "what is above")]
OFFSET = 100


def encode(text: str) -> list[int]:
    return [OFFSET + ord(letter) for letter in text]


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(token - OFFSET) for token in ids)


def wide_config() -> ModelConfig:
    return make_config(vocab_size=1000)


@pytest.fixture
def tasks() -> DictionaryTasks:
    return DictionaryTasks(
        config=wide_config(), items=ITEMS, codes=CODES, glosses=GLOSSES, encode=encode
    )


def many(tasks: DictionaryTasks, count: int, seed: int = 0) -> list[Exchange]:
    rng = random.Random(seed)
    return [tasks.draw(rng) for _ in range(count)]


def span(number: int) -> tuple[int, ...]:
    return (BEGIN_IMAGE, *CODES[number], END_IMAGE)


SPANS = {span(number): number for number in range(3)}


def test_draws_are_a_function_of_the_seed(tasks: DictionaryTasks) -> None:
    random.seed(1)
    first = many(tasks, 50)
    random.seed(2)
    assert first == many(tasks, 50)
    assert first != many(tasks, 50, seed=1)


def test_all_tasks_come_in_their_shares(tasks: DictionaryTasks) -> None:
    kinds: Counter[str] = Counter()
    for exchange in many(tasks, 3000):
        if exchange.answer[0] == BEGIN_IMAGE:
            kinds["picture"] += 1
        elif exchange.question[0] == BEGIN_IMAGE:
            kinds["name"] += 1
        else:
            kinds["gloss"] += 1
    assert kinds["picture"] / 3000 == pytest.approx(0.55, abs=0.03)
    assert kinds["name"] / 3000 == pytest.approx(0.27, abs=0.03)
    assert kinds["gloss"] / 3000 == pytest.approx(0.18, abs=0.03)


def test_answers_end_with_eos_and_hold_no_other(tasks: DictionaryTasks) -> None:
    for exchange in many(tasks, 500):
        assert exchange.answer[-1] == EOS
        assert EOS not in (*exchange.question, *exchange.answer[:-1])


def test_a_name_is_answered_with_its_picture(tasks: DictionaryTasks) -> None:
    for number, item in enumerate(ITEMS):
        rng = random.Random(number)
        for _ in range(100):
            exchange = tasks.name_to_picture(number, rng)
            assert exchange.answer == (*span(number), EOS)
            question = decode(exchange.question)
            is_by_keywords = set(question.split(", ")) <= set(item.keywords)
            assert item.name in question or is_by_keywords


def test_a_picture_is_answered_with_name_and_keywords(tasks: DictionaryTasks) -> None:
    rng = random.Random(3)
    questions = set()
    for _ in range(50):
        exchange = tasks.picture_to_name(0, rng)
        assert exchange.question[:6] == span(0)
        questions.add(decode(exchange.question[6:]))
        assert decode(exchange.answer[:-1]) == "red apple\nfruit, red, apple"
    assert questions == {"", "what is this?", "name this picture"}


def test_a_word_is_answered_with_its_gloss_and_perhaps_its_picture(tasks: DictionaryTasks) -> None:
    glosses = dict(GLOSSES)
    seen: set[tuple[str, bool]] = set()
    rng = random.Random(4)
    for _ in range(400):
        exchange = tasks.word_to_gloss(rng)
        text = exchange.answer[:-1]
        has_picture = text[-1] == END_IMAGE
        if has_picture:
            assert decode(exchange.question).startswith("tell me about ")
            number = SPANS[text[-6:]]
            text = text[:-6]
            assert decode(exchange.question).endswith(ITEMS[number].name)
        word = next(word for word in glosses if word in decode(exchange.question))
        assert decode(text) == glosses[word]
        seen.add((word, has_picture))
    pictured = {("owl", True), ("bee", True)}
    assert seen == {(word, False) for word in glosses} | pictured  # the sky has no picture


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_prompts_have_the_right_article(item: Item) -> None:
    rng = random.Random(5)
    prompts = {draw_prompt(item, rng) for _ in range(400)}
    article = "an" if item.name == "owl" else "a"
    assert {
        item.name,
        f"draw {article} {item.name}",
        f"{article} {item.name}",
        f"draw {item.name}",
        f"picture of {article} {item.name}",
    } <= prompts
    for prompt in prompts:
        if item.name not in prompt:
            words = prompt.split(", ")
            assert len(words) == len(set(words)) <= 4
            assert set(words) <= set(item.keywords)


def test_descriptions_are_bounded() -> None:
    assert describe(ITEMS[1]) == "owl"
    assert describe(ITEMS[2]) == "bee\na, b, c, d, e, f"
