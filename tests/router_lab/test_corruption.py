"""What corruption does, how much of it, and that it is a function of its seed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from momaserve.errors import DataError
from momaserve.router_lab import corruption
from momaserve.router_lab.corruption import (
    PICTURE_SHIFTS,
    Pixels,
    crop,
    gaussian,
    german_names,
    hue,
    in_german,
    shuffled,
    typos,
)

LETTERS = "the quick brown fox jumps over the lazy dog " * 40


def grey(side: int = 32) -> Pixels:
    return np.full((side, side, 3), 128, dtype=np.uint8)


def picture(side: int = 32) -> Pixels:
    """Smooth and coloured."""
    ramp = np.linspace(40, 220, side)
    planes = np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None])
    return np.stack(planes, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("name", PICTURE_SHIFTS)
def test_pictures_keep_their_shape_and_drift_with_severity(name: str) -> None:
    corrupt, severities, _ = PICTURE_SHIFTS[name]
    assert list(severities) == sorted(severities)
    distances = []
    for severity in severities:
        made = corrupt(picture(), severity, random.Random(1))
        assert made.shape == (32, 32, 3)
        assert made.dtype == np.uint8
        assert np.array_equal(made, corrupt(picture(), severity, random.Random(1)))
        distances.append(np.abs(made.astype(int) - picture()).mean())
    assert 0 < distances[0] < distances[-1]


def test_noise_is_as_strong_as_it_says() -> None:
    made = gaussian(grey(96), 12, random.Random(0)).astype(float)
    assert made.std() == pytest.approx(12, rel=0.03)
    assert made.mean() == pytest.approx(128, abs=0.4)


def test_a_crop_is_a_part_of_the_picture() -> None:
    striped = np.zeros((40, 40, 3), dtype=np.uint8)
    striped[20:] = 255
    assert np.array_equal(crop(grey(), 50, random.Random(3)), grey())
    made = crop(striped, 50, random.Random(3))
    assert made.shape == striped.shape
    assert not np.array_equal(made, striped)


def test_hues_turn_and_greys_stay() -> None:
    red = np.zeros((4, 4, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert np.array_equal(hue(grey(), 180, random.Random(0)), grey())
    turned = hue(red, 120, random.Random(0))[0, 0]
    assert int(turned.argmax()) == 1  # green
    assert np.array_equal(hue(red, 360, random.Random(0)), red)


def test_typos_are_as_many_as_they_say() -> None:
    made = typos(LETTERS, 10, random.Random(2))
    assert made == typos(LETTERS, 10, random.Random(2))
    assert typos(LETTERS, 0, random.Random(2)) == LETTERS
    words, wrong = LETTERS.split(), made.split()
    assert 0.9 < len(wrong) / len(words) < 1.1
    assert 0.7 < len(made) / len(LETTERS) < 1.3
    assert made.count(" ") > 0.9 * LETTERS.count(" ")  # letters slip, spaces between words stay


def test_words_are_only_moved() -> None:
    text = "one two three four five six seven eight"
    made = shuffled(text, 100, random.Random(0))
    assert made != text
    assert sorted(made.split()) == sorted(text.split())
    assert shuffled(text, 0, random.Random(0)) == text
    half = shuffled(" ".join(map(str, range(200))), 50, random.Random(0)).split()
    assert 60 < sum(word != str(place) for place, word in enumerate(half)) < 120


def test_the_longest_known_name_is_translated() -> None:
    say = in_german({"red apple": "roter apfel", "apple": "apfel", "boat": "boot"})
    assert say("draw a red apple and a boat", 100, random.Random(0)) == (
        "draw a roter apfel and a boot"
    )
    assert say("red boat", 0, random.Random(0)) == "red boat"
    many = say("boat " * 200, 25, random.Random(0)).split().count("boot")
    assert 30 < many < 70


def test_german_names_come_from_the_same_emoji(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: str, language: str, *names: tuple[str, str]) -> None:
        entries = "".join(
            f'<annotation cp="{cp}" type="tts">{name}</annotation>' for cp, name in names
        )
        path = tmp_path / folder / f"{language}.xml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<ldml><annotations>{entries}</annotations></ldml>", encoding="utf-8")

    monkeypatch.setattr(corruption, "CLDR_FOLDER", tmp_path)
    with pytest.raises(DataError, match="is missing"):
        german_names()
    write("annotations", "en", ("🍎", "Red Apple"), ("🚀", "rocket"))
    write("annotations", "de", ("🍎", "roter Apfel"), ("🎸", "Gitarre"))
    write("annotationsDerived", "en", ("🍎", "something else"))
    write("annotationsDerived", "de")
    assert german_names() == {"red apple": "roter apfel"}
    write("annotations", "de", ("🎸", "Gitarre"))
    with pytest.raises(DataError, match="no German names"):
        german_names()
