"""Short phrases that people would use for an item, beside its name and its keywords.

From four sources: other forms of the name, its names in other Englishes, the synonyms and a few
hyponyms of the WordNet sense that the picture shows, and the young and the sexes of animals. A
word that is kept out for the test is never a phrase; it only comes together with another word.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from momaserve.training.dictionary.item import Item
from momaserve.training.dictionary.name_forms import flag_forms, name_forms, tone_forms
from momaserve.training.dictionary.own_glosses import OWN_GLOSSES
from momaserve.training.dictionary.plain_words import is_kept_out
from momaserve.training.dictionary.taste import is_fit_gloss, is_fit_word
from momaserve.training.dictionary.wordnet import ANIMALS, Sense, WordNet, order_senses

MAX_SHARED = 4
"""Items that may have the same phrase; more would teach that it means nothing."""
MAX_PHRASES = 14
MAX_TONED_PHRASES = 6
MAX_WORDS = 7
MAX_TONE_WORDS = 4
"""Further words for each skin tone."""
_NUM_HYPONYMS = 3
_HYPONYM, _HYPERNYM = "~", "@"
_BODY, _PERSON = 8, 18
_CATEGORIES = {ANIMALS: "animal", _BODY: "body part", 13: "food", 20: "plant"}
_SEEN_FILES = frozenset({*_CATEGORIES, 6, 17, _PERSON, 19})
"""Lexicographer files that can be seen: those, artifacts, objects, persons, phenomena."""
_BLOCKS = (
    (0x1F400, 0x1F43D, frozenset({ANIMALS})),
    (0x1F980, 0x1F9AE, frozenset({ANIMALS})),
    (0x1F331, 0x1F344, frozenset({20})),
    (0x1F345, 0x1F353, frozenset({13})),
    (0x1F950, 0x1F96F, frozenset({13})),
)
"""First and last code point of emoji of one field, and that field's lexicographer files."""
_NUM_SHARED_WORDS = 2
"""Content words that a sense must share with keywords and own gloss where its choice is unsure."""
_YOUNG_OR_SEX = re.compile(
    r"^(?:an? )?(?:young|baby|(?:adult )?(?:fe)?male|castrated|uncastrated)\b[a-z ]* ([a-z]+)$"
)
_LATIN = re.compile(r"^[A-Z][a-z]+ [a-z]+( [a-z]+)?$")
_COUNTRY_FILE = 15
_STATE = re.compile(r"an? [^;]*\bstate (?:in|on|of) ")
"""The other Georgia."""
_UNFIT = frozenset({"entire", "red china flag", "communist china flag"})
"""Phrases that are right by rule and wrong for people."""


class PhraseFinder:
    """Finds phrases; `other_names` are names and keywords by emoji string."""

    def __init__(self, wordnet: WordNet, other_names: Mapping[str, Sequence[str]]) -> None:
        self._wordnet = wordnet
        self._other_names = other_names
        self._kin: dict[str, list[str]] = {}
        for sense in wordnet.nouns(ANIMALS):
            match = _YOUNG_OR_SEX.match(sense.gloss.split(";")[0].strip())
            if match is not None and is_fit_gloss(sense.gloss):
                self._kin.setdefault(match[1], []).extend(sense.lemmas[:2])

    def add_phrases(self, items: Sequence[Item]) -> list[Item]:
        """Returns the items with their phrases, which are few items' each and nobody's name."""
        names = {item.name for item in items} | {item.base_name for item in items}
        owners: dict[str, set[str]] = {}  # of keywords, by base name
        for item in items:
            for keyword in item.keywords:
                owners.setdefault(keyword, set()).add(item.base_name)
        plain: dict[str, list[str]] = {}
        for item in items:
            if item.tone is None:
                raw = self._of_plain(item, owners)
                plain[item.base_name] = _clean(raw, item, names)
        counts = Counter(phrase for phrases in plain.values() for phrase in phrases)
        for name, phrases in plain.items():
            few = [phrase for phrase in phrases if counts[phrase] <= MAX_SHARED]
            plain[name] = few[:MAX_PHRASES]
        done = []
        for item in items:
            phrases = plain.get(item.base_name, name_forms(item.base_name))
            if item.tone is not None:
                forms = tone_forms(item.base_name, phrases, item.tone)
                phrases = _clean(forms, item, names)[:MAX_TONED_PHRASES]
            done.append(replace(item, phrases=phrases))
        return done

    def _of_plain(self, item: Item, owners: Mapping[str, set[str]]) -> list[str]:
        """All candidates for an untoned item, the surest first."""
        if item.kind == "flag":
            return [*name_forms(item.name), *self._of_flag(item), *self._elsewhere(item, owners)]
        found = self._elsewhere(item, owners) + name_forms(item.name)
        word = self._known_word(item)
        sense = None if word is None else self.picture_sense(word, item)
        if word is None or sense is None:
            return found + ([] if word else self._with_other_head(item))
        found += self._synonyms(word, sense)
        if sense.lexicographer_file == ANIMALS:
            kin = self._kin.get(word, [])
            found += [name for name in kin if owners.get(name, {name}) <= {item.base_name, name}]
        found += self._hyponyms(sense, item, owners)
        if is_kept_out(item.name):
            # It is never asked for by its name alone, so it needs company.
            above = self._wordnet.related(sense, _HYPERNYM)
            kinds = [_CATEGORIES.get(sense.lexicographer_file, ""), *(s.lemmas[0] for s in above)]
            pairs = [(item.name, kind.lower()) for kind in kinds if kind]
            found = [form for a, b in pairs for form in (f"{a} {b}", f"{b} {a}")] + found
        return found

    def _elsewhere(self, item: Item, owners: Mapping[str, set[str]]) -> list[str]:
        """What other Englishes call it, unless that is a keyword of other items."""
        return [
            name.removeprefix("flag: ")
            for name in self._other_names.get(item.emoji, ())
            if owners.get(name, {item.base_name}) == {item.base_name}
        ]

    def _of_flag(self, item: Item) -> list[str]:
        place = item.name.removeprefix("flag: ")
        senses = [
            sense
            for sense in self._wordnet.senses(place, "noun")
            if sense.lexicographer_file == _COUNTRY_FILE and not _STATE.match(sense.gloss)
        ][:1]
        adjectives = [word for word in self._wordnet.adjectives(senses) if "-" not in word]
        adjectives = list(dict.fromkeys(word.lower() for word in adjectives))[:1]
        others = [lemma.lower() for sense in senses for lemma in sense.lemmas[1:]]
        forms = [flag_forms(other)[0] for other in others if len(other) <= 20][:3]
        return [f"{adjective} flag" for adjective in adjectives] + forms

    def _known_word(self, item: Item) -> str | None:
        """The item's name, or the animal or the singular in it, as WordNet has it."""
        words = [item.name.replace("’", "'")]
        if item.name.endswith(" face"):
            animal = item.name.removesuffix(" face")
            senses = order_senses(self._wordnet.senses(animal, "noun"), is_picture=True)
            words += [animal] if senses and senses[0].lexicographer_file == ANIMALS else []
        words += [re.sub(r"(?<=[a-z])s$", "", words[0]), re.sub(r"ies$", "y", words[0])]
        return next((word for word in words if self._wordnet.senses(word, "noun")), None)

    def picture_sense(self, word: str, item: Item) -> Sense | None:
        """The noun sense that the item's picture shows, if that is sure enough.

        The choice is that of glosses. Where a gloss had to be written by hand WordNet's order
        failed, so the sense must share words with that gloss and with the item's keywords, or be
        of the field in whose Unicode block the emoji lies.
        """
        senses = [s for s in self._wordnet.senses(word, "noun") if is_fit_gloss(s.gloss)]
        if not senses:
            return None
        if word not in OWN_GLOSSES:
            sense = order_senses(senses, is_picture=True)[0]
            return sense if sense.lexicographer_file in _SEEN_FILES or len(senses) == 1 else None
        files = _files_of(item.emoji)
        senses = [s for s in senses if not files or s.lexicographer_file in files]
        hints = _content(" ".join([OWN_GLOSSES[word], *item.keywords])) - _content(word)
        scored = [(len(hints & self._context(sense)), sense) for sense in senses]
        score, best = max(scored, key=lambda pair: pair[0], default=(0, None))
        return best if files or score >= _NUM_SHARED_WORDS else None

    def _context(self, sense: Sense) -> set[str]:
        above = self._wordnet.related(sense, _HYPERNYM)
        lemmas = [lemma for s in (sense, *above) for lemma in s.lemmas]
        return _content(" ".join([sense.gloss.split('"')[0], *lemmas]))

    def _synonyms(self, word: str, sense: Sense) -> list[str]:
        """Other words of the sense, without Latin and without words that mostly mean another."""
        return [
            lemma.lower()
            for lemma in sense.lemmas
            if lemma.lower() != word
            and not (_LATIN.match(lemma) and sense.lexicographer_file in (5, 20))
            and self._wordnet.rank(lemma, sense) < 2
        ]

    def _hyponyms(self, sense: Sense, item: Item, owners: Mapping[str, set[str]]) -> list[str]:
        """Kinds of the thing, the commonest first, unless CLDR has them for other items."""
        if sense.lexicographer_file in (_BODY, _PERSON):
            return []
        kinds = [
            kind
            for kind in self._wordnet.related(sense, _HYPONYM)
            if is_fit_gloss(kind.gloss)
            and not kind.is_instance
            and not _LATIN.match(kind.lemmas[0])
            and self._wordnet.rank(kind.lemmas[0], kind) == 0
            and owners.get(kind.lemmas[0].lower(), {item.base_name}) == {item.base_name}
        ]
        kinds.sort(key=lambda kind: -kind.count)
        return [kind.lemmas[0].lower() for kind in kinds[:_NUM_HYPONYMS]]

    def _with_other_head(self, item: Item) -> list[str]:
        """ "small airplane" is a small plane: the last word, or the first of two, in synonyms."""
        match = re.fullmatch(r"(\w+)( and \w+)", item.name)
        before, head, after = ("", *match.groups()) if match else ("", "", "")
        if not match and re.fullmatch(r"[a-z]+(?: [a-z]+)+", item.name):
            before, _, head = item.name.rpartition(" ")
            before += " "
        senses = self._wordnet.senses(head, "noun")
        if not senses or head in OWN_GLOSSES or senses[0].lexicographer_file not in (5, 6, 13):
            return []
        return [
            f"{before}{other}{after}"
            for other in self._synonyms(head, senses[0])
            if self._wordnet.senses(other, "noun")[0].count
        ]


def _files_of(emoji: str) -> frozenset[int]:
    """Lexicographer files of the field that an emoji's code point belongs to; empty: unknown."""
    point = ord(emoji[0])
    return next((files for a, b, files in _BLOCKS if a <= point <= b), frozenset())


def _content(text: str) -> set[str]:
    """Words that say something, without plural endings."""
    words = re.findall(r"[a-z]{3,}", text.lower())
    return {word.removesuffix("s") for word in words} - _EMPTY_WORDS


_EMPTY_WORDS = frozenset({
    "the", "and", "with", "for", "that", "which", "has", "have", "from", "are", "used", "use",
    "its", "his", "not", "who", "someone", "something", "any", "one", "kind", "made", "usually",
    "often", "very", "out", "into", "can", "small", "large",
})  # fmt: skip


def _clean(phrases: Sequence[str], item: Item, names: set[str]) -> list[str]:
    """Phrases fit to be asked for this item, in their order; kept-out ones get company."""
    own = {item.name, *item.keywords}
    found: list[str] = []
    for phrase in dict.fromkeys(" ".join(phrase.split()) for phrase in phrases):
        if phrase in own:
            continue
        if is_kept_out(phrase):
            company = [item.name.removeprefix("flag: "), *item.keywords]
            company = [w for w in company if set(w.split(" ")).isdisjoint(phrase.split(" "))]
            found += [f"{phrase} {word}" for word in company[:2]]
            found += [f"{word}, {phrase}" for word in company[:1]]
        else:
            found.append(phrase)
    return [
        phrase
        for phrase in dict.fromkeys(found)
        if phrase not in names
        and phrase not in _UNFIT
        and 0 < len(phrase.split(" ")) <= MAX_WORDS + MAX_TONE_WORDS * phrase.count("skin tone")
        and is_fit_word(phrase)
        and is_fit_gloss(phrase)
        and not is_kept_out(phrase)
    ]
