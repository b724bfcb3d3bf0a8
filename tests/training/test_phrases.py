"""Phrases: forms of names, other Englishes, WordNet, and what is sorted out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from momaserve.training.dictionary import sources
from momaserve.training.dictionary.cldr import REGIONS, read_other_names
from momaserve.training.dictionary.item import Item
from momaserve.training.dictionary.name_forms import flag_forms, name_forms, tone_forms
from momaserve.training.dictionary.phrases import MAX_SHARED, PhraseFinder
from momaserve.training.dictionary.plain_words import is_kept_out
from momaserve.training.dictionary.wordnet import WordNet, parse_synset
from tests.training.factory import make_item

needs_wordnet = pytest.mark.skipif(
    not (sources.WORDNET_FOLDER / "data.noun").is_file(),
    reason=f"Debian package {sources.WORDNET_PACKAGE} is not installed",
)


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("face with tears of joy", {"tears of joy face", "tears of joy"}),
        ("smiling face with sunglasses", {"sunglasses face", "cool smiling face with sunglasses"}),
        ("crying face", {"crying", "crying smiley", "sad crying face"}),
        ("sun with face", {"face sun"}),
        ("keycap: 3", {"3", "three", "number three"}),
        ("keycap: #", {"#", "hash key"}),
        ("keycap: 10", {"10", "ten"}),
        ("woman: blond hair", {"blond woman", "woman with blond hair"}),
        ("man: bald", {"bald man"}),
        ("person: beard", {"bearded person"}),
        ("kiss: man, man", {"two men kissing"}),
        ("couple with heart: woman, man", {"woman and man in love"}),
        ("family: man, woman, boy", {"family of man, woman and boy"}),
        ("person running", {"running person", "running"}),
        ("men wrestling", {"wrestling men", "guys wrestling"}),
        ("woman playing handball", {"lady playing handball"}),
        ("heart with arrow", {"arrow heart"}),
        ("glass of milk", {"milk glass"}),
        ("six-thirty", {"half past six"}),
        ("o button (blood type)", {"blood type o"}),
        ("japanese “secret” button", {"secret button", "japanese secret button"}),
        ("flag: japan", {"japan flag", "flag of japan"}),
    ],
)
def test_name_forms(name: str, some: set[str]) -> None:
    forms = name_forms(name)
    assert some <= set(forms)
    assert name not in forms
    assert len(set(forms)) == len(forms)


def test_a_name_that_follows_no_pattern_has_no_forms() -> None:
    assert name_forms("pizza") == []


def test_flag_forms_have_their_article() -> None:
    assert flag_forms("united states")[1] == "flag of the united states"
    assert flag_forms("turks & caicos islands")[0] == "turks and caicos islands flag"


def test_tone_forms_say_the_whole_tone() -> None:
    assert tone_forms("waving hand", ["wave"], "dark skin tone") == [
        "dark skin tone waving hand",
        "waving hand with dark skin",
        "dark skin tone wave",
    ]
    forms = tone_forms("man: bald", ["bald man"], "light skin tone")
    assert forms == ["light skin tone bald man", "bald man with light skin"]
    two = tone_forms("handshake", [], "light skin tone, dark skin tone")
    assert two == ["handshake, light skin tone and dark skin tone"]


def test_names_of_other_englishes(tmp_path: Path) -> None:
    for folder in ("annotations", "annotationsDerived"):
        (tmp_path / folder).mkdir()
        for region in REGIONS:
            entries = ""
            if folder == "annotations" and region in ("GB", "AU"):
                entries = f"""<annotation cp="🍆">Fruit | {region}</annotation>
                <annotation cp="🍆" type="tts">Aubergine</annotation>"""
            text = f"<ldml><annotations>{entries}</annotations></ldml>"
            (tmp_path / folder / f"en_{region}.xml").write_text(text, "utf-8")
    assert read_other_names(tmp_path) == {"🍆": ["aubergine", "fruit", "gb", "au"]}


def test_lemmas_and_pointers_of_a_synset() -> None:
    line = (
        "09 05 n 02 water_Dog 0 pooch(p) 1 003 @ 00000123 n 0000 + 00000456 v 0101 "
        "~ 00000789 n 0000 | a pet  "
    )
    sense = parse_synset(line, 0)
    assert sense.lemmas == ("water Dog", "pooch")
    assert sense.pointers == (("@", 123), ("~", 789))


@pytest.fixture(scope="module")
def wordnet() -> WordNet:
    return WordNet()


def found(wordnet: WordNet, *items: Item, **others: list[str]) -> list[list[str]]:
    return [item.phrases for item in PhraseFinder(wordnet, others).add_phrases(items)]


def item(id: int, name: str, emoji: str, **changes: Any) -> Item:
    return make_item(id, name, emoji=emoji, **changes)


@needs_wordnet
def test_synonyms_and_hyponyms_come_from_the_sense_of_the_picture(wordnet: WordNet) -> None:
    car, seal, kite = found(
        wordnet,
        item(0, "automobile", "🚗", keywords=["car"]),
        item(1, "seal", "🦭", keywords=["sea lion"]),
        item(2, "kite", "🪁", keywords=["fly", "soar"]),
    )
    assert {"motorcar", "jeep"} <= set(car)
    assert "eared seal" in seal
    assert not any("hawk" in phrase for phrase in kite)  # not the bird


@needs_wordnet
def test_kept_out_words_come_in_company_only(wordnet: WordNet) -> None:
    dog, car, elephant = found(
        wordnet,
        item(0, "dog", "🐕", keywords=["pet"]),
        item(1, "automobile", "🚗", keywords=["car"]),
        item(2, "elephant", "🐘", keywords=[]),
    )
    assert {"puppy dog", "puppy pet", "dog, puppy", "dog animal"} <= set(dog)
    assert "auto automobile" in car
    assert "elephant animal" in elephant
    assert not any(map(is_kept_out, [*dog, *car, *elephant]))


@needs_wordnet
def test_flags_have_adjectives(wordnet: WordNet) -> None:
    germany, georgia, netherlands = found(
        wordnet,
        item(0, "flag: germany", "🇩🇪", kind="flag"),
        item(1, "flag: georgia", "🇬🇪", kind="flag"),
        item(2, "flag: netherlands", "🇳🇱", kind="flag"),
    )
    assert {"germany flag", "flag of germany", "german flag", "germany"} <= set(germany)
    assert not any("peach" in phrase for phrase in georgia)  # not the American state
    assert {"dutch flag", "flag of the netherlands", "holland flag"} <= set(netherlands)


@needs_wordnet
def test_phrases_are_few_items_and_nobody_elses_name(wordnet: WordNet) -> None:
    letters = "abcdef"
    shared = [item(n, f"thing {letters[n]}", letters[n]) for n in range(MAX_SHARED + 1)]
    others = {letter: ["gadget", "owl", "bitch", "red"] for letter in letters}
    phrases = found(wordnet, *shared, item(9, "owl", "🦉"), **others)
    assert phrases[: MAX_SHARED + 1] == [[]] * (MAX_SHARED + 1)
    fewer = found(wordnet, *shared[:MAX_SHARED], item(9, "owl", "🦉"), **others)
    assert fewer[0] == ["gadget"]


@needs_wordnet
def test_toned_items_take_the_phrases_of_their_person(wordnet: WordNet) -> None:
    _, toned = found(
        wordnet,
        item(0, "student", "🧑"),
        item(1, "student: dark skin tone", "🧑", kind="zwj_tone", keywords=["dark skin tone"]),
    )
    assert toned[:2] == ["dark skin tone student", "student with dark skin"]
    assert "dark skin tone pupil" in toned
