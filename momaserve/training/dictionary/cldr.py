"""Emoji names and keywords, as the Unicode CLDR gives them in English.

Knows the XML of CLDR annotations; knows nothing of fonts or of the split of the data.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from momaserve.errors import DataError
from momaserve.training.dictionary.sources import CLDR_FOLDER, CLDR_PACKAGE, require

ANNOTATION_FILES = ("annotations/en.xml", "annotationsDerived/en.xml")
"""Hand-written annotations first, then those that CLDR derives for sequences."""
REGIONS = ("001", "GB", "AU", "CA", "IN")
"""English elsewhere than in the United States: other names for the same pictures."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """What CLDR says about one emoji string (variation selectors are already removed there)."""

    emoji: str
    name: str
    """Lower case, with CLDR's own punctuation."""
    keywords: tuple[str, ...]
    """Lower case, in CLDR's order, without repeats and without the name itself."""


def parse_annotations(xml: str) -> list[Annotation]:
    """Reads one annotation file; strings that have no name are left out.

    Raises:
        DataError: `xml` is not well formed.
    """
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for emoji, text, is_name in _entries(xml):
        if is_name:
            names[emoji] = text
        else:
            keywords[emoji] = _split(text)
    return [
        Annotation(
            emoji,
            name,
            tuple(dict.fromkeys(k for k in keywords.get(emoji, []) if k != name)),
        )
        for emoji, name in names.items()
        if emoji and name
    ]


def read_annotations(folder: Path = CLDR_FOLDER) -> list[Annotation]:
    """Reads all English annotations, in file order, each emoji string once.

    Raises:
        DataError: a file is missing or broken.
    """
    found: dict[str, Annotation] = {}
    for name in ANNOTATION_FILES:
        path = require(folder / name, CLDR_PACKAGE)
        for annotation in parse_annotations(path.read_text(encoding="utf-8")):
            found.setdefault(annotation.emoji, annotation)
    return list(found.values())


def read_other_names(folder: Path = CLDR_FOLDER) -> dict[str, list[str]]:
    """Reads what each emoji string is called in other Englishes: names first, then keywords.

    Raises:
        DataError: a file is missing or broken.
    """
    names: dict[str, list[str]] = {}
    keywords: dict[str, list[str]] = {}
    for region in REGIONS:
        for name in ANNOTATION_FILES:
            path = require(folder / name.replace("en.xml", f"en_{region}.xml"), CLDR_PACKAGE)
            for emoji, text, is_name in _entries(path.read_text(encoding="utf-8")):
                if is_name:
                    names.setdefault(emoji, []).append(text)
                else:
                    keywords.setdefault(emoji, []).extend(_split(text))
    both = dict.fromkeys([*names, *keywords])
    return {e: list(dict.fromkeys([*names.get(e, []), *keywords.get(e, [])])) for e in both}


def _entries(xml: str) -> Iterator[tuple[str, str, bool]]:
    """Each annotation as (emoji, text in lower case, whether it is the name)."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise DataError(f"CLDR annotations are not well-formed XML: {error}") from error
    for element in root.iter("annotation"):
        text = (element.text or "").strip().lower()
        yield element.get("cp", ""), text, element.get("type") == "tts"


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split("|") if word.strip()]
