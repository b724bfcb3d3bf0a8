"""Pictures of a data set as squares of pixels, for the picture encoder or to train one.

What may be opened is what the server opens: the same kinds, checked by the same code.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from momaserve.errors import DataError, PromptError
from momaserve.tokens.image import ImageLimits, fit_square, open_image
from momaserve.training.documents.reader import read_records
from momaserve.training.documents.record import PicturePart, Skipped, UnusableError
from momaserve.training.documents.summary import SkipCounts

LIMITS = ImageLimits()


def square(picture: PicturePart, side: int, limits: ImageLimits = LIMITS) -> np.ndarray[Any, Any]:
    """The whole picture in a white square, uint8 [S, S, 3], as serving fits it.

    Raises:
        UnusableError: too large, too small, broken or of another kind.
    """
    data = picture.read(limits.max_bytes)
    try:
        return np.array(fit_square(open_image(data, limits), side))
    except PromptError as error:
        reason, _, detail = str(error).partition(", got ")  # the limit stays in the reason
        raise UnusableError(reason, detail) from error
    except MemoryError as error:
        raise UnusableError("the picture does not fit into memory") from error


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures to train an image tokenizer on, uint8 [N, S, S, 3], no two alike."""

    train: np.ndarray[Any, Any]
    held_out: np.ndarray[Any, Any]
    skips: SkipCounts


def pictures(path: Path, side: int, *, held_out_share: float = 0.02, seed: int = 0) -> Pictures:
    """All pictures of a data set, `side` pixels high and wide; a broken one spares its record.

    Raises:
        DataError: no data set, or fewer than two different pictures in it.
    """
    found: dict[bytes, np.ndarray[Any, Any]] = {}
    skips = SkipCounts()
    for record in read_records(path, seed):
        if isinstance(record, Skipped):
            skips.add(record)
            continue
        for picture in record.pictures:
            try:
                pixels = square(picture, side)
            except UnusableError as error:
                skips.add(Skipped(record.where, error.reason, error.detail))
                continue
            found[hashlib.sha256(b"%d/" % seed + pixels.tobytes()).digest()] = pixels
    if len(found) < 2:
        raise DataError(f"{path} has {len(found)} different pictures; at least 2 are needed{skips}")
    digests = sorted(found)
    num_held_out = min(max(1, round(held_out_share * len(found))), len(found) - 1)
    chosen = set(digests[:num_held_out])
    train = np.stack([pixels for digest, pixels in found.items() if digest not in chosen])
    return Pictures(train, np.stack([found[digest] for digest in sorted(chosen)]), skips)
