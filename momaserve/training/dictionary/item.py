"""One picture of the dictionary and what its name says about kind and skin tone."""

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["base", "tone", "zwj", "zwj_tone", "flag", "keycap", "latin"]
Split = Literal["train", "held_out"]

TONES = (
    "light skin tone",
    "medium-light skin tone",
    "medium skin tone",
    "medium-dark skin tone",
    "dark skin tone",
)

_ZERO_WIDTH_JOINER = "\u200d"
_KEYCAP = "\u20e3"
_BLACK_FLAG = "\U0001f3f4"
_SOUNDS_CONSONANT = ("uni", "use", "euro", "ewe", "one", "once", "ufo", "uk", "u.s.")
_SOUNDS_VOWEL = ("hour", "honest", "heir", "8", "11", "18", "x-")
_SPELLED_OUT = frozenset({"atm", "ng", "sos"})
"""Abbreviations read letter by letter, the first of which sounds like a vowel."""
_TONE_MODIFIERS = frozenset("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One picture; its row in glyphs.npy is `id`, and `asdict` of it is a line of items.jsonl."""

    id: int
    emoji: str
    name: str
    keywords: list[str]
    kind: Kind
    tone: str | None
    """The whole tone part of the name ("light skin tone, dark skin tone" for two persons)."""
    base_name: str
    """The name without its tone part."""
    split: Split
    duplicate_of: int | None
    """The first item with the very same pixels, if this is not it."""
    phrases: list[str] = field(default_factory=list)
    """What else people would call it, beside name and keywords; see phrases.py."""


def classify(emoji: str) -> Kind:
    """Returns the kind of an emoji string, from its code points alone."""
    if _KEYCAP in emoji:
        return "keycap"
    if _is_flag(emoji):
        return "flag"
    if len(emoji) == 1 and emoji < "\u0100":
        return "latin"
    is_toned = len(emoji) > 1 and not _TONE_MODIFIERS.isdisjoint(emoji)
    if _ZERO_WIDTH_JOINER in emoji:
        return "zwj_tone" if is_toned else "zwj"
    return "tone" if is_toned else "base"


def split_tone(name: str) -> tuple[str, str | None]:
    """Splits "man: dark skin tone, red hair" into ("man: red hair", "dark skin tone").

    Returns:
        The name without its tones, and the tones in order joined by ", ", or None without any.
    """
    head, colon, tail = name.partition(": ")
    parts = tail.split(", ")
    tones = [part for part in parts if part in TONES]
    if not colon or not tones:
        return name, None
    others = [part for part in parts if part not in TONES]
    return (f"{head}: {', '.join(others)}" if others else head), ", ".join(tones)


def article(name: str) -> str:
    """Returns "a" or "an" for a prompt such as "draw an elephant", by sound where it matters."""
    first = name.split(" ")[0].lower().strip("“”\"'(")
    if first.startswith(_SOUNDS_CONSONANT):
        return "a"
    if first.startswith(_SOUNDS_VOWEL) or first in _SPELLED_OUT:
        return "an"
    return "an" if first.startswith(("a", "e", "i", "o", "u")) else "a"


def _is_flag(emoji: str) -> bool:
    is_region = len(emoji) == 2 and all("\U0001f1e6" <= c <= "\U0001f1ff" for c in emoji)
    is_tagged = emoji[:1] == _BLACK_FLAG and len(emoji) > 1 and emoji[1] >= "\U000e0000"
    return is_region or is_tagged
