"""Exchanges of the illustrated dictionary: a function of the seed, and what they hold."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from momaserve.models.config import ModelConfig
from momaserve.training.dictionary.plain_words import is_kept_out
from momaserve.training.tasks import UNCONDITIONAL, DictionaryTasks, Exchange, describe
from tests.models.factory import make_config
from tests.training.factory import BEGIN_IMAGE, END_IMAGE, EOS, make_item

ITEMS = [
    make_item(0, "red apple", keywords=["fruit", "red", "apple"]),
    make_item(1, "owl", keywords=[]),
    make_item(2, "wasp", keywords=["a", "b", "c", "d", "e", "f", "g"]),
]
CODES = [[[4, 5, 6, 7], [4, 5, 6, 8]], [[8, 9, 10, 11]], [[12, 13, 14, 15]]]
GLOSSES = [("owl", "a bird of the night"), ("wasp", "it has a sting"), ("sky", "what is above")]
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


def span(number: int, variant: int = 0) -> tuple[int, ...]:
    return (BEGIN_IMAGE, *CODES[number][variant], END_IMAGE)


def asked(exchange: Exchange) -> str:
    assert exchange.question is not None
    return decode(exchange.question)


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
        elif exchange.question is not None and exchange.question[0] == BEGIN_IMAGE:
            kinds["name"] += 1
        else:
            kinds["gloss"] += 1
    assert kinds["picture"] / 3000 == pytest.approx(0.60, abs=0.03)
    assert kinds["name"] / 3000 == pytest.approx(0.27, abs=0.03)
    assert kinds["gloss"] / 3000 == pytest.approx(0.13, abs=0.03)


def test_answers_end_with_eos_and_hold_no_other(tasks: DictionaryTasks) -> None:
    for exchange in many(tasks, 500):
        assert exchange.answer[-1] == EOS
        assert EOS not in (*(exchange.question or ()), *exchange.answer[:-1])


def test_some_pictures_come_unasked(tasks: DictionaryTasks) -> None:
    drawn = [e for e in many(tasks, 5000) if e.answer[0] == BEGIN_IMAGE]
    unasked = [e for e in drawn if e.question is None]
    assert len(unasked) / len(drawn) == pytest.approx(UNCONDITIONAL, abs=0.02)
    assert {e.answer for e in unasked} == {(*span(number), EOS) for number in range(3)}


def test_a_name_is_answered_with_its_picture(tasks: DictionaryTasks) -> None:
    for number, item in enumerate(ITEMS):
        rng = random.Random(number)
        for _ in range(100):
            exchange = tasks.name_to_picture(number, rng)
            assert exchange.answer == (*span(number), EOS)
            words = set(asked(exchange).replace(",", "").rstrip("?").split(" "))
            assert words & {*item.name.split(" "), *item.keywords}


def test_a_picture_is_answered_with_name_and_keywords(tasks: DictionaryTasks) -> None:
    rng = random.Random(3)
    questions, pictures = set(), set()
    for _ in range(50):
        exchange = tasks.picture_to_name(0, rng)
        assert exchange.question is not None
        pictures.add(exchange.question[:6])
        questions.add(decode(exchange.question[6:]))
        assert decode(exchange.answer[:-1]) == "red apple\nfruit, red, apple"
    assert questions == {"", "what is this?", "name this picture"}
    assert pictures == {span(0), span(0, variant=1)}


def test_a_word_is_answered_with_its_gloss_and_perhaps_its_picture(tasks: DictionaryTasks) -> None:
    glosses = dict(GLOSSES)
    seen: set[tuple[str, bool]] = set()
    rng = random.Random(4)
    for _ in range(400):
        exchange = tasks.word_to_gloss(rng)
        text = exchange.answer[:-1]
        has_picture = text[-1] == END_IMAGE
        if has_picture:
            assert asked(exchange).startswith("tell me about ")
            number = SPANS[text[-6:]]
            text = text[:-6]
            assert asked(exchange).endswith(ITEMS[number].name)
        word = next(word for word in glosses if word in asked(exchange))
        assert decode(text) == glosses[word]
        seen.add((word, has_picture))
    pictured = {("owl", True), ("wasp", True)}
    assert seen == {(word, False) for word in glosses} | pictured  # the sky has no picture


def test_a_word_alone_never_asks_for_a_gloss(tasks: DictionaryTasks) -> None:
    rng = random.Random(6)
    words = {word for word, _ in GLOSSES}
    for _ in range(300):
        question = asked(tasks.word_to_gloss(rng))
        assert question not in words
        assert any(question.endswith((word, f"{word}?", f"{word} mean?")) for word in words)


def test_a_kept_out_word_has_a_gloss_but_no_picture() -> None:
    tasks = DictionaryTasks(
        config=wide_config(),
        items=[make_item(0, "pizza", keywords=["cheese", "slice"])],
        codes=CODES[1:2],
        glosses=[("pizza", "a flat pie")],
        encode=encode,
    )
    for exchange in many(tasks, 2000):
        if exchange.question is not None and exchange.question[0] != BEGIN_IMAGE:
            assert not is_kept_out(asked(exchange))
        if exchange.answer[-2] == END_IMAGE:
            assert exchange.answer[0] == BEGIN_IMAGE  # no gloss before it


def test_descriptions_are_bounded() -> None:
    assert describe(ITEMS[1]) == "owl"
    assert describe(ITEMS[2]) == "wasp\na, b, c, d, e, f"


@pytest.mark.parametrize("shares", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.3, 0.5)])
def test_each_task_has_its_share(shares: tuple[float, float]) -> None:
    tasks = DictionaryTasks(
        config=wide_config(),
        items=ITEMS,
        codes=CODES,
        glosses=[("sky", "what is above")],
        encode=encode,
        picture_share=shares[0],
        name_share=shares[1],
    )
    exchanges = many(tasks, 600)
    drawn = sum(exchange.answer[0] == BEGIN_IMAGE for exchange in exchanges)
    named = sum((exchange.question or (0,))[0] == BEGIN_IMAGE for exchange in exchanges)
    assert (drawn / 600, named / 600) == pytest.approx(shares, abs=0.06)
    assert 0 not in shares or 0 in (drawn, named)
