"""The data of the illustrated dictionary: parsing, sense choice, kinds and tones, the split."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from momaserve.errors import DataError
from momaserve.training.dictionary import sources
from momaserve.training.dictionary.build import build, draw_items, summarize
from momaserve.training.dictionary.cldr import Annotation, parse_annotations, read_annotations
from momaserve.training.dictionary.item import TONES, Item, Kind, article, classify, split_tone
from momaserve.training.dictionary.notices import collect_notices
from momaserve.training.dictionary.own_glosses import OWN_GLOSSES
from momaserve.training.dictionary.split import MIN_TRAINED_TONES, NUM_HELD_OUT, hold_out
from momaserve.training.dictionary.taste import is_fit_gloss, is_fit_word
from momaserve.training.dictionary.wordnet import (
    MAX_WORDS,
    Sense,
    WordNet,
    order_senses,
    parse_counts,
    parse_index,
    parse_synset,
    shorten,
)
from momaserve.training.dictionary.words import choose_words

XML = """<ldml><annotations>
  <annotation cp="🍎">apple | Fruit | red | red apple</annotation>
  <annotation cp="🍎" type="tts">red apple</annotation>
  <annotation cp="🈁">“here” | katakana</annotation>
  <annotation cp="🈁" type="tts">Japanese “here” button</annotation>
  <annotation cp="x">nameless</annotation>
</annotations></ldml>"""


def make_item(id: int = 0, name: str = "red apple", emoji: str = "🍎") -> Item:
    base_name, tone = split_tone(name)
    return Item(
        id=id,
        emoji=emoji,
        name=name,
        keywords=["fruit"],
        kind=classify(emoji),
        tone=tone,
        base_name=base_name,
        split="train",
        duplicate_of=None,
    )


def make_people(num_people: int, *, kind: Kind) -> list[Item]:
    return [
        replace(make_item(name=f"person {p}: {tone}"), id=5 * p + t, kind=kind)
        for p in range(num_people)
        for t, tone in enumerate(TONES)
    ]


def make_sense(file: int, count: int = 0, *, is_instance: bool = False) -> Sense:
    return Sense(file, f"a gloss of file {file}", count, is_instance)


def test_annotations_keep_cldr_punctuation_in_lower_case() -> None:
    assert parse_annotations(XML) == [
        Annotation("🍎", "red apple", ("apple", "fruit", "red")),
        Annotation("🈁", "japanese “here” button", ("“here”", "katakana")),
    ]


def test_broken_annotations_are_a_data_error() -> None:
    with pytest.raises(DataError, match="well-formed"):
        parse_annotations("<ldml>")


def test_first_annotation_file_wins(tmp_path: Path) -> None:
    for folder in ("annotations", "annotationsDerived"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "en.xml").write_text(XML.replace("red apple", folder), "utf-8")
    assert next(a.name for a in read_annotations(tmp_path)) == "annotations"


def test_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get install unicode-cldr-core"):
        read_annotations(tmp_path)
    with pytest.raises(DataError, match="apt-get install wordnet-base"):
        WordNet(tmp_path)
    with pytest.raises(DataError, match="apt-get install fonts-noto-color-emoji"):
        collect_notices(tmp_path)


@pytest.mark.parametrize(
    ("emoji", "kind"),
    [
        ("🍎", "base"),
        ("🏽", "base"),  # the swatch itself
        ("🏁", "base"),
        ("👋🏽", "tone"),
        ("👩‍🚀", "zwj"),
        ("👩🏽‍🚀", "zwj_tone"),
        ("🏳‍🌈", "zwj"),
        ("🇫🇷", "flag"),
        ("🏴\U000e0067\U000e0062\U000e007f", "flag"),
        ("#⃣", "keycap"),
        ("©", "latin"),
    ],
)
def test_kind(emoji: str, kind: str) -> None:
    assert classify(emoji) == kind


@pytest.mark.parametrize(
    ("name", "base_name", "tone"),
    [
        ("red apple", "red apple", None),
        ("light skin tone", "light skin tone", None),
        ("keycap: 1", "keycap: 1", None),
        ("waving hand: dark skin tone", "waving hand", "dark skin tone"),
        ("man: light skin tone, red hair", "man: red hair", "light skin tone"),
        (
            "kiss: man, man, light skin tone, medium-dark skin tone",
            "kiss: man, man",
            "light skin tone, medium-dark skin tone",
        ),
    ],
)
def test_tone_part_of_a_name(name: str, base_name: str, tone: str | None) -> None:
    assert split_tone(name) == (base_name, tone)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("elephant", "an"),
        ("red apple", "a"),
        ("unicorn", "a"),
        ("umbrella", "an"),
        ("hourglass done", "an"),
        ("horse", "a"),
        ("one-piece swimsuit", "a"),
        ("euro banknote", "a"),
        ("“here” button", "a"),
        ("e-mail", "an"),
        ("8 ball", "an"),
        ("x-ray", "an"),
        ("ufo", "a"),
        ("atm sign", "an"),
        ("sos button", "an"),
    ],
)
def test_article(name: str, expected: str) -> None:
    assert article(name) == expected


def test_index_gives_offsets_in_sense_order() -> None:
    text = "  1 licence line  \nwhale n 2 3 @ ~ + 2 1 10129133 02062744  \n"
    assert parse_index(text) == {"whale": [10129133, 2062744]}


def test_counts_join_adjective_satellites_to_adjectives() -> None:
    text = "man%1:18:00:: 1 1493\nred%5:00:01:chromatic:00 1 43\n"
    assert parse_counts(text) == {("man", 1, 1): 1493, ("red", 3, 1): 43}


def test_synset_line() -> None:
    line = '02062744 05 n 01 whale 0 001 @ 02062430 n 0000 | a large mammal; "a | whale"  '
    assert parse_synset(line, 7) == Sense(
        5,
        'a large mammal; "a | whale"',
        7,
        is_instance=False,
        lemmas=("whale",),
        pointers=(("@", 2062430),),
    )
    river = "09405949 17 n 01 Red 0 001 @i 09411430 n 0000 | a tributary  "
    assert parse_synset(river, 0).is_instance


@pytest.mark.parametrize(
    ("senses", "is_picture", "file"),
    [
        ([make_sense(18, 2), make_sense(5)], True, 5),  # whale: a large person, the animal
        ([make_sense(18, 900), make_sense(6, 3)], True, 18),  # man: familiar, not the chess piece
        ([make_sense(6, 2), make_sense(5)], True, 5),  # turtle: the sweater, the animal
        ([make_sense(4, 2), make_sense(6)], False, 4),  # not a picture: the commoner one
        ([make_sense(17, is_instance=True), make_sense(7)], True, 7),  # a river called Red
        ([make_sense(17, is_instance=True)], True, 17),
    ],
)
def test_sense_choice(senses: list[Sense], is_picture: bool, file: int) -> None:
    ordered = order_senses(senses, is_picture=is_picture)
    assert ordered[0].lexicographer_file == file
    assert sorted(map(repr, ordered)) == sorted(map(repr, senses))


def test_no_senses_stay_none() -> None:
    assert order_senses([], is_picture=True) == []


@pytest.mark.parametrize(
    ("gloss", "short"),
    [
        ('the organ of sight; "she has eyes"', "the organ of sight"),
        ("(Greek mythology) a monster, e.g. `hydra'; more", None),
        ("a Japanese dish (with rice) of fish", "a japanese dish of fish"),
        ("one", None),
        ("", None),
        ("born in 1901", None),
        (
            "a very long gloss of one word with no end in sight that goes on and on for ever",
            "a very long gloss of one word with no end in sight",
        ),
    ],
)
def test_shorten(gloss: str, short: str | None) -> None:
    assert shorten(gloss) == short


def test_cut_glosses_do_not_dangle() -> None:
    gloss = "one of a set of small pieces of stiff paper, thick, marked in various ways and used"
    assert shorten(gloss) == "one of a set of small pieces of stiff paper, thick"


def test_taste() -> None:
    assert not is_fit_word("bitch")
    assert is_fit_word("butterfly")
    assert not is_fit_gloss("(ethnic slur) an offensive term")
    assert is_fit_gloss("a member of the genus Canis")


def test_own_glosses_are_short_and_plain() -> None:
    for word, gloss in OWN_GLOSSES.items():
        assert shorten(gloss) == gloss, word
        assert len(gloss.split()) <= MAX_WORDS + 2, word
        assert is_fit_gloss(gloss), word


def test_names_come_before_the_words_they_share() -> None:
    items = [
        make_item(0, "red apple"),
        make_item(1, "green apple"),
        make_item(2, "ghost", "👻"),
        make_item(3, "flag: chad", "🇹🇩"),
    ]
    known = {"ghost", "apple", "red", "chad", "fruit"}
    assert choose_words(items, known) == ["ghost", "apple", "fruit", "red"]
    assert choose_words(items, known, num_words=2) == ["ghost", "apple"]


def test_hold_out_is_fixed_and_leaves_every_person_trained_tones() -> None:
    people = make_people(40, kind="tone")
    marked = hold_out(people)
    held_out = [item for item in marked if item.split == "held_out"]

    assert marked == hold_out(people)
    assert len(held_out) == NUM_HELD_OUT["tone"]
    assert [item.id for item in marked] == [item.id for item in people]
    for person in {item.base_name for item in people}:
        trained = [i for i in marked if i.base_name == person and i.split == "train"]
        assert len(trained) >= MIN_TRAINED_TONES


def test_pictures_with_twins_and_pictures_without_tone_are_never_held_out() -> None:
    people = make_people(4, kind="tone")
    twins = [replace(item, duplicate_of=0) for item in people[:5]]
    plain = [replace(item, tone=None) for item in people[5:10]]
    marked = hold_out([*twins, *plain, *people[10:]])
    assert all(item.split == "train" for item in marked[:10])
    assert sum(item.split == "held_out" for item in marked) == 4  # two of five, for two persons


def test_draw_items_skips_what_cannot_be_drawn_and_finds_twins() -> None:
    def render(emoji: str) -> np.ndarray | None:
        return None if emoji == "x" else np.full((2, 2, 3), ord(emoji) % 2, np.uint8)

    annotations = [Annotation(c, f"name {c}", ()) for c in "axbc"]
    items, pictures = draw_items(annotations, render)
    assert [(i.id, i.emoji, i.duplicate_of) for i in items] == [
        (0, "a", None),
        (1, "b", None),
        (2, "c", 0),
    ]
    assert len(pictures) == 3
    assert "pictures: 3 (2 distinct)" in summarize(items, 0)


def _missing_package() -> str | None:
    files = {
        sources.FONT_PACKAGE: sources.FONT_FILE,
        sources.CLDR_PACKAGE: sources.CLDR_FOLDER / "annotations/en.xml",
        sources.WORDNET_PACKAGE: sources.WORDNET_FOLDER / "data.noun",
    }
    return next((package for package, path in files.items() if not path.is_file()), None)


@pytest.mark.skipif(
    _missing_package() is not None, reason=f"Debian package {_missing_package()} is not installed"
)
def test_whole_dictionary(tmp_path: Path) -> None:
    summary = build(tmp_path, size=16)
    items = [
        json.loads(line)
        for line in (tmp_path / "items.jsonl").read_text("utf-8").split("\n")
        if line
    ]
    glosses = [json.loads(line) for line in (tmp_path / "glosses.jsonl").read_text().splitlines()]
    pictures = np.load(tmp_path / "glyphs.npy")

    assert f"pictures: {len(items)}" in summary
    assert pictures.shape == (len(items), 16, 16, 3)
    assert len(items) > 3000
    assert [item["id"] for item in items] == list(range(len(items)))
    assert len({item["name"] for item in items}) == len(items)
    assert all((item["tone"] is None) == ("tone" not in item["kind"]) for item in items)
    assert sum(item["split"] == "held_out" for item in items) == sum(NUM_HELD_OUT.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "glosses.jsonl",
        "glyphs.npy",
        "items.jsonl",
    ]
    by_word = {entry["word"]: entry["gloss"] for entry in glosses}
    assert len(by_word) == len(glosses) == 1200
    assert "cat" in by_word
    notices = collect_notices()
    assert all(w in notices for w in ("SIL OPEN FONT LICENSE", "Unicode, Inc", "Princeton"))
