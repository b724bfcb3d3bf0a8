"""Senses of words, their relations and short glosses, from the WordNet database files.

Knows the two WordNet file formats it reads (wndb(5WN), cntlist(5WN)) and how to choose a sense
that fits a picture; which words are wanted is the caller's business.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from momaserve.training.dictionary.own_glosses import OWN_GLOSSES
from momaserve.training.dictionary.sources import WORDNET_FOLDER, WORDNET_PACKAGE, require
from momaserve.training.dictionary.taste import is_fit_gloss, is_fit_word

PARTS_OF_SPEECH = {"noun": 1, "adj": 3, "verb": 2, "adv": 4}
"""In the order tried; the value is WordNet's number for it in sense keys."""
PICTURE_FILES = frozenset({5, 6, 8, 13, 17, 20})
"""Lexicographer files whose senses can be seen: animal, artifact, body, food, object, plant."""
ANIMALS = 5
NUM_FAMILIAR = 8
"""A first sense seen this often more than the best picture sense is kept ("man" the person)."""
MAX_WORDS = 12
"""Where a long clause is cut; a clause of two words more is left whole."""
MIN_WORDS = 2

_BREAKS = frozenset({
    "that", "which", "who", "whose", "having", "used", "especially", "usually", "often", "where",
    "when", "with", "and", "or", "but", "such", "so", "because", "as", "made", "worn", "living",
    "found", "by", "for", "from", "in", "on",
})  # fmt: skip
"""A long gloss may be cut before one of these."""
_PREPOSITIONS = frozenset({"by", "for", "from", "in", "on", "with", "as"})
_DANGLING = frozenset({
    "a", "an", "the", "of", "to", "and", "or", "that", "which", "in", "on", "with", "for", "by",
    "is", "are", "has", "as", "at", "from", "its", "be", "into", "any", "especially", "usually",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sense:
    """One meaning of a word."""

    lexicographer_file: int
    gloss: str
    """The whole gloss, with its examples."""
    count: int
    """How often the sense was seen in WordNet's tagged texts."""
    is_instance: bool
    """It is one proper thing, such as a river called Red."""
    lemmas: tuple[str, ...] = ()
    """All words for it, with their capitals, with spaces between their parts."""
    pointers: tuple[tuple[str, int], ...] = ()
    """WordNet's symbol of a relation to a noun and the offset of that noun's synset."""


class WordNet:
    """The senses of words, read from the database files on demand."""

    def __init__(self, folder: Path = WORDNET_FOLDER) -> None:
        """
        Raises:
            DataError: the database is not installed.
        """
        self._data: dict[str, bytes] = {}
        self._offsets: dict[str, dict[str, list[int]]] = {}
        for part in PARTS_OF_SPEECH:
            index = require(folder / f"index.{part}", WORDNET_PACKAGE)
            self._offsets[part] = parse_index(index.read_text(encoding="ascii"))
            self._data[part] = require(folder / f"data.{part}", WORDNET_PACKAGE).read_bytes()
        counts = require(folder / "cntlist.rev", WORDNET_PACKAGE)
        self._counts = parse_counts(counts.read_text(encoding="ascii"))

    def __contains__(self, word: object) -> bool:
        lemma = str(word).replace(" ", "_")
        return any(lemma in offsets for offsets in self._offsets.values())

    def senses(self, word: str, part: str) -> list[Sense]:
        """Returns the senses of `word` as a part of speech, most frequent first."""
        lemma = word.replace(" ", "_")
        number = PARTS_OF_SPEECH[part]
        return [
            self._read(part, offset, self._counts.get((lemma, number, position), 0))
            for position, offset in enumerate(self._offsets[part].get(lemma, []), start=1)
        ]

    def related(self, sense: Sense, symbol: str) -> list[Sense]:
        """Returns the nouns that `sense` points to by one relation, such as "~" for hyponyms.

        Their counts are those of their first lemma in that sense.
        """
        found = []
        for pointer, offset in sense.pointers:
            if pointer == symbol:
                first = self._read("noun", offset, 0).lemmas[0]
                position = self._offsets["noun"][_to_lemma(first)].index(offset) + 1
                count = self._counts.get((_to_lemma(first), PARTS_OF_SPEECH["noun"], position), 0)
                found.append(self._read("noun", offset, count))
        return found

    def rank(self, word: str, sense: Sense) -> int:
        """Returns which sense of the noun `word` it is, from 0, the commonest."""
        glosses = [other.gloss for other in self.senses(word.lower(), "noun")]
        return glosses.index(sense.gloss)

    def nouns(self, lexicographer_file: int) -> Iterator[Sense]:
        """Returns all noun synsets of one lexicographer file, in file order."""
        wanted = f" {lexicographer_file:02} n "
        for line in self._data["noun"].decode("ascii").splitlines():
            if line[8:14] == wanted:
                yield parse_synset(line, 0)

    def adjectives(self, nouns: Sequence[Sense]) -> list[str]:
        """Returns the adjectives that pertain to nouns, as "Japanese" does to Japan."""
        lemmas = {lemma for noun in nouns for lemma in noun.lemmas}
        return [word for lemma in sorted(lemmas) for word in self._pertainyms.get(lemma, ())]

    @cached_property
    def _pertainyms(self) -> dict[str, list[str]]:
        """Adjectives by every word for the noun that they pertain to."""
        found: dict[str, list[str]] = {}
        for line in self._data["adj"].decode("ascii").splitlines():
            if " \\ " not in line or line.startswith(" "):
                continue
            adjective = parse_synset(line, 0)
            for symbol, offset in adjective.pointers:
                if symbol == "\\":
                    for lemma in self._read("noun", offset, 0).lemmas:
                        found.setdefault(lemma, []).append(adjective.lemmas[0])
        return found

    def _read(self, part: str, offset: int, count: int) -> Sense:
        data = self._data[part]
        return parse_synset(data[offset : data.index(b"\n", offset)].decode("ascii"), count)

    def gloss(self, word: str, *, is_picture: bool) -> str | None:
        """Returns a short gloss of `word`, or None if there is none fit to be shown.

        Args:
            word: in lower case, with spaces between its parts.
            is_picture: it names a picture, so a noun that can be seen is likely meant; if not,
                the commonest part of speech and sense are.
        """
        if word in OWN_GLOSSES:
            return OWN_GLOSSES[word]
        if not is_fit_word(word):
            return None
        parts = [self.senses(word, part) for part in PARTS_OF_SPEECH]
        if not is_picture:
            parts.sort(key=lambda senses: -sum(sense.count for sense in senses))
        for senses in parts:
            for sense in order_senses(senses, is_picture=is_picture):
                short = shorten(sense.gloss)
                if short is not None and is_fit_gloss(sense.gloss):
                    return short
        return None


def _to_lemma(word: str) -> str:
    return word.lower().replace(" ", "_")


def parse_index(text: str) -> dict[str, list[int]]:
    """Reads an index file: the byte offsets of each lemma's synsets, in sense order."""
    offsets: dict[str, list[int]] = {}
    for line in text.splitlines():
        if line.startswith(" "):
            continue
        fields = line.split()
        offsets[fields[0]] = [int(field) for field in fields[-int(fields[2]) :]]
    return offsets


def parse_counts(text: str) -> dict[tuple[str, int, int], int]:
    """Reads cntlist.rev: (lemma, part of speech, sense number) to its count in tagged texts."""
    counts: dict[tuple[str, int, int], int] = {}
    for line in text.splitlines():
        key, sense_number, count = line.split()
        lemma, _, rest = key.partition("%")
        part = 3 if rest[0] == "5" else int(rest[0])  # 5: adjective satellites, in the adj files
        counts[lemma, part, int(sense_number)] = int(count)
    return counts


def parse_synset(line: str, count: int) -> Sense:
    """Reads one line of a data file as a sense that was seen `count` times."""
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    end = 4 + 2 * int(fields[3], 16)
    lemmas = [re.sub(r"\(.*\)$", "", field).replace("_", " ") for field in fields[4:end:2]]
    stop = end + 1 + 4 * int(fields[end])
    pointers = [
        (fields[place], int(fields[place + 1]))
        for place in range(end + 1, stop, 4)
        if fields[place + 2] == "n"
    ]
    return Sense(
        int(fields[1]),
        gloss.strip(),
        count,
        is_instance="@i" in fields,
        lemmas=tuple(lemmas),
        pointers=tuple(pointers),
    )


def order_senses(senses: list[Sense], *, is_picture: bool) -> list[Sense]:
    """Puts the likeliest sense first, proper things last, the others in their order.

    The first sense gives way to one that can be seen (an animal before anything else), unless it
    is familiar; for a word that names no picture, it has to be no more familiar than the other.
    """
    ordered = sorted(senses, key=lambda sense: sense.is_instance)
    visible = [s for s in ordered if s.lexicographer_file in PICTURE_FILES and not s.is_instance]
    if is_picture:
        visible.sort(key=lambda sense: sense.lexicographer_file != ANIMALS)
    margin = NUM_FAMILIAR if is_picture else 0
    if visible and ordered[0].count <= visible[0].count + margin:
        ordered.sort(key=lambda sense: sense is not visible[0])
    return ordered


def shorten(gloss: str) -> str | None:
    """Cuts a gloss to its first clause, in plain lower-case words.

    Returns:
        `MIN_WORDS` to `MAX_WORDS` words, or None if no such clause can be cut.
    """
    text = re.sub(r"\([^)]*\)", " ", gloss)
    text = re.split(r'[;:"]|--| - ', text)[0]
    text = re.sub(r"\s+", " ", text).replace(" ,", ",").replace("`", "'").strip(" ,.").lower()
    if not re.fullmatch(r"[a-z][a-z' ,-]*", text):
        return None
    words = text.removesuffix(" etc").rstrip(",").split(" ")
    if len(words) > MAX_WORDS + 2:
        words = _cut(words, is_strict=True) or _cut(words, is_strict=False)
    return " ".join(words).rstrip(",") if len(words) >= MIN_WORDS else None


def _cut(words: list[str], *, is_strict: bool) -> list[str]:
    """Returns the longest beginning of at most `MAX_WORDS` that can stand alone, or nothing.

    A strict cut does not part a participle from its preposition ("paper marked | in").
    """
    for length in range(MAX_WORDS, 3, -1):
        last, following = words[length - 1], words[length]
        is_break = last.endswith(",") or following in _BREAKS
        if not is_break or last.rstrip(",") in _DANGLING:
            continue
        if is_strict and following in _PREPOSITIONS and last.endswith(("ed", "ing", "such", "t")):
            continue
        return words[:length]
    return []
