"""What the world does to pictures and words: noise, JPEG, crops, colours, typos, languages."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from momaserve.errors import DataError
from momaserve.training.dictionary.cldr import parse_annotations
from momaserve.training.dictionary.sources import CLDR_FOLDER, CLDR_PACKAGE, require

Pixels = np.ndarray[Any, Any]
PictureCorruption = Callable[[Pixels, float, random.Random], Pixels]
"""uint8 [S, S, 3], severity -> uint8 [S, S, 3]."""
TextCorruption = Callable[[str, float, random.Random], str]

_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_MAX_NAME_WORDS = 6
_ANNOTATIONS = ("annotations/{}.xml", "annotationsDerived/{}.xml")


def gaussian(pixels: Pixels, severity: float, rng: random.Random) -> Pixels:
    """Independent noise; severity is its standard deviation in steps of 255."""
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0.0, severity, pixels.shape)
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)


def jpeg(pixels: Pixels, severity: float, rng: random.Random) -> Pixels:
    """Compressed and read back; severity is 100 minus Pillow's quality."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=max(1, round(100 - severity)))
    return np.asarray(Image.open(stream).convert("RGB"))


def crop(pixels: Pixels, severity: float, rng: random.Random) -> Pixels:
    """A part anywhere, resized to the whole; severity is the percentage cut off each axis."""
    side = len(pixels)
    kept = max(1, round(side * (1 - severity / 100)))
    left, top = rng.randint(0, side - kept), rng.randint(0, side - kept)
    part = Image.fromarray(pixels).crop((left, top, left + kept, top + kept))
    return np.asarray(part.resize((side, side), Image.Resampling.BICUBIC))


def hue(pixels: Pixels, severity: float, rng: random.Random) -> Pixels:
    """Colours turned around the wheel by `severity` degrees."""
    planes = np.array(Image.fromarray(pixels).convert("HSV"))
    planes[..., 0] = (planes[..., 0].astype(int) + round(severity / 360 * 256)) % 256
    return np.asarray(Image.fromarray(planes, "HSV").convert("RGB"))


def typos(text: str, severity: float, rng: random.Random) -> str:
    """Slips of the finger in `severity` percent of the letters: swapped, left out, doubled or
    the key beside it."""
    letters = list(text)
    place = 0
    while place < len(letters):
        if letters[place].isalpha() and rng.random() < severity / 100:
            slip = rng.randrange(4)
            if slip == 0 and place + 1 < len(letters):
                letters[place : place + 2] = letters[place + 1], letters[place]
                place += 1
            elif slip == 1 and len(letters) > 1:
                del letters[place]
                continue
            elif slip == 2:
                letters.insert(place, letters[place])
                place += 1
            else:
                letters[place] = _beside(letters[place], rng)
        place += 1
    return "".join(letters)


def _beside(letter: str, rng: random.Random) -> str:
    for row in _KEYBOARD:
        place = row.find(letter.lower())
        if place >= 0:
            return rng.choice(row[max(0, place - 1) : place] + row[place + 1 : place + 2])
    return letter


def shuffled(text: str, severity: float, rng: random.Random) -> str:
    """`severity` percent of the words change places with one another."""
    words = text.split(" ")
    chosen = [place for place in range(len(words)) if rng.random() < severity / 100]
    moved = chosen[:]
    rng.shuffle(moved)
    result = words[:]
    for place, other in zip(chosen, moved, strict=True):
        result[place] = words[other]
    return " ".join(result)


def in_german(names: Mapping[str, str]) -> TextCorruption:
    """A corruption that says known names in German; severity is the percentage of them."""

    def translated(text: str, severity: float, rng: random.Random) -> str:
        words = text.split(" ")
        result: list[str] = []
        place = 0
        while place < len(words):
            for length in range(min(_MAX_NAME_WORDS, len(words) - place), 0, -1):
                german = names.get(" ".join(words[place : place + length]))
                if german is not None:
                    break
            else:
                length, german = 1, None
            is_said = german is not None and rng.random() < severity / 100
            result += [german or ""] if is_said else words[place : place + length]
            place += length
        return " ".join(result)

    return translated


def german_names() -> dict[str, str]:
    """What CLDR calls the same emoji in English and in German, in lower case.

    Raises:
        DataError: CLDR's annotations are not installed, or broken.
    """
    languages: list[dict[str, str]] = []
    for language in ("en", "de"):
        found: dict[str, str] = {}
        for pattern in _ANNOTATIONS:
            path = require(CLDR_FOLDER / pattern.format(language), CLDR_PACKAGE)
            for annotation in parse_annotations(path.read_text(encoding="utf-8")):
                found.setdefault(annotation.emoji, annotation.name)
        languages.append(found)
    english, german = languages
    pairs = {name: german[emoji] for emoji, name in english.items() if emoji in german}
    if not pairs:
        raise DataError("CLDR has no German names for its English ones")
    return pairs


PICTURE_SHIFTS: Mapping[str, tuple[PictureCorruption, tuple[float, ...], str]] = {
    "gaussian noise": (gaussian, (4, 12, 32, 80), "standard deviation, of 255"),
    "jpeg": (jpeg, (20, 60, 85, 97), "100 - quality"),
    "crop": (crop, (4, 10, 25, 50), "cut off each axis, %"),
    "colour": (hue, (10, 30, 90, 180), "hue turned, degrees"),
}
"""By name: what is done, how much of it, and in which unit."""
TEXT_SHIFTS: Mapping[str, tuple[TextCorruption, tuple[float, ...], str]] = {
    "typos": (typos, (2, 5, 10, 25), "letters, %"),
    "shuffled words": (shuffled, (25, 50, 75, 100), "words, %"),
}
