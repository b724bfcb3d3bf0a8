"""Ways to ask for a picture: its name, mostly, and whatever else people would type.

A prompt is never one that is kept out for the test, and never one that a reader would take for
another picture: skin tones are always said, and words that many items share come together.
"""

import random
from collections.abc import Sequence

from momaserve.errors import DataError
from momaserve.training.dictionary.item import TONES, Item
from momaserve.training.dictionary.plain_words import is_kept_out
from momaserve.training.dictionary.wrappers import DRAW_WRAPPERS, wrap

MAX_SHARED = 6
"""Items without tone that a single keyword, or a list of them, may fit."""
_BARE, _WRAPPED, _ADJECTIVE, _PHRASE, _LIST = 0.40, 0.57, 0.69, 0.82, 0.95
"""Shares of the kinds of prompts, summed up; the rest are single keywords."""
_WRAPPED_PHRASES = 0.25
_ADJECTIVES = (
    "big", "small", "little", "cute", "nice", "pretty", "beautiful", "funny", "lovely", "new",
    "one", "great", "simple", "good", "typical", "cool", "real", "this",
)  # fmt: skip
"""They change nothing about the picture, and show that it is the other word that matters."""
_MAX_TERMS = 5
_NUM_TRIES = 8
_EMPTY_WORDS = frozenset({"and", "of", "with", "the", "in", "on", "at", "a"})


class Prompts:
    """Draws prompts for the items that it was made for."""

    def __init__(self, items: Sequence[Item]) -> None:
        """
        Raises:
            DataError: an item whose name is kept out has nothing else to be asked by.
        """
        self._items = items
        self._names = {item.name for item in items} | {item.base_name for item in items}
        self._keywords = [_keywords(item) for item in items]
        self._fits: dict[str, set[str]] = {}  # a term to the base names of items that have it
        for item, keywords in zip(items, self._keywords, strict=True):
            for term in (*keywords, *_name_words(item)):
                self._fits.setdefault(term, set()).add(item.base_name)
        self._last_resorts = [self._last_resort(index) for index in range(len(items))]

    def draw(self, index: int, rng: random.Random) -> str:
        """A prompt for one item; a pure function of the state of `rng`."""
        for _ in range(_NUM_TRIES):
            prompt = self._try(index, rng)
            if prompt is not None and not is_kept_out(prompt):
                return prompt
        return self._last_resorts[index]

    def _try(self, index: int, rng: random.Random) -> str | None:
        item = self._items[index]
        share = rng.random()
        if share < _BARE:
            return item.name
        if share < _WRAPPED:
            # Names such as "flag: japan" do not sit well in a sentence.
            names = [p for p in item.phrases[:2] if "," not in p] if ":" in item.name else []
            return wrap(rng.choice(DRAW_WRAPPERS), rng.choice([item.name, *names]))
        if share < _ADJECTIVE:
            return self._with_adjective(index, rng)
        if share < _PHRASE:
            if not item.phrases:
                return item.name
            phrase = rng.choice(item.phrases)
            is_wrapped = "," not in phrase and rng.random() < _WRAPPED_PHRASES
            return wrap(rng.choice(DRAW_WRAPPERS), phrase) if is_wrapped else phrase
        if share < _LIST:
            return self._list(index, rng)
        return self._single(index, rng)

    def _with_adjective(self, index: int, rng: random.Random) -> str | None:
        """The name, or a keyword that says enough, after an adjective that says nothing."""
        item = self._items[index]
        if item.tone is not None or ":" in item.name:
            return None
        terms = self._telling(index)
        term = rng.choice(terms) if terms and rng.random() < 0.4 else item.name
        prompt = f"{rng.choice(_ADJECTIVES)} {term}"
        return None if prompt in self._names or prompt in self._fits else prompt

    def _telling(self, index: int) -> list[str]:
        """Keywords that say enough alone."""
        return [
            keyword
            for keyword in self._keywords[index]
            if len(self._fits[keyword]) <= MAX_SHARED and keyword not in self._names
        ]

    def _single(self, index: int, rng: random.Random) -> str | None:
        """A keyword that says enough alone; in a list if it is kept out."""
        if self._items[index].tone is not None:
            return None
        enough = self._telling(index)
        if not enough:
            return None
        keyword = rng.choice(enough)
        return self._list(index, rng, keyword) if is_kept_out(keyword) else keyword

    def _list(self, index: int, rng: random.Random, first: str | None = None) -> str | None:
        """A keyword with others or with words of the name, until few items fit."""
        item, keywords = self._items[index], self._keywords[index]
        if not keywords:
            return None
        first = first or rng.choice(keywords)
        others = [term for term in (*keywords, *_name_words(item)) if term != first]
        rng.shuffle(others)
        terms = [first]
        wanted = rng.randint(2, _MAX_TERMS)
        fitting = self._fits[first]
        for term in dict.fromkeys(others):
            if len(terms) >= wanted and len(fitting) <= MAX_SHARED:
                break
            terms.append(term)
            fitting = fitting & self._fits[term]
        if len(fitting) > MAX_SHARED:
            return None
        rng.shuffle(terms)
        if item.tone is not None:
            terms.insert(rng.choice((0, len(terms))), item.tone)
        prompt = rng.choice((", ", ", ", " ")).join(terms)
        is_elsewhere = prompt in self._names and prompt != item.name
        return None if len(terms) < 2 or is_elsewhere else prompt

    def _last_resort(self, index: int) -> str:
        """What is asked when chance gave nothing: the name, or else the name in company."""
        item = self._items[index]
        ways = [item.name, *(f"{item.name}, {word}" for word in self._keywords[index])]
        for way in (*ways, *item.phrases):
            if not is_kept_out(way):
                return way
        raise DataError(
            f"item {item.name!r} is kept out of training and has no keyword and no phrase to be "
            "asked by; if its files are old, build the dictionary again"
        )


def _keywords(item: Item) -> list[str]:
    """Keywords that speak of the picture and not of its tone."""
    unsaid = {*TONES, item.name, item.base_name}
    return [keyword for keyword in item.keywords if keyword not in unsaid]


def _name_words(item: Item) -> list[str]:
    words = [word.strip(":,“”()") for word in item.base_name.split(" ")]
    words = [word for word in words if any(map(str.isalnum, word))]
    return [word for word in dict.fromkeys(words) if word not in _EMPTY_WORDS]
