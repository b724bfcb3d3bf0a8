"""Emoji names and keywords, as the Unicode CLDR gives them in English.

Knows the XML of CLDR annotations; knows nothing of fonts or of the split of the data.
"""

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from momaserve.errors import DataError
from momaserve.training.dictionary.sources import CLDR_FOLDER, CLDR_PACKAGE, require

ANNOTATION_FILES = ("annotations/en.xml", "annotationsDerived/en.xml")
"""Hand-written annotations first, then those that CLDR derives for sequences."""


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
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise DataError(f"CLDR annotations are not well-formed XML: {error}") from error
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for element in root.iter("annotation"):
        emoji, text = element.get("cp", ""), (element.text or "").strip().lower()
        if element.get("type") == "tts":
            names[emoji] = text
        else:
            keywords[emoji] = [word.strip() for word in text.split("|")]
    return [
        Annotation(
            emoji,
            name,
            tuple(dict.fromkeys(k for k in keywords.get(emoji, []) if k and k != name)),
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
