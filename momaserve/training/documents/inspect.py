"""Looks a data set over without keeping it: what training on it would see and skip."""

from __future__ import annotations

from pathlib import Path

from momaserve.training.documents.encode import Encoder
from momaserve.training.documents.record import Skipped
from momaserve.training.documents.summary import Summary


def inspect(path: Path, encoder: Encoder, seed: int = 0) -> Summary:
    """Read and encode everything once; `str()` of the result is for people.

    Raises:
        DataError: there is no data set at `path`.
    """
    summary = Summary()
    for document in encoder.encode(path, seed):
        if isinstance(document, Skipped):
            summary.skips.add(document)
        else:
            summary.count(document, encoder.vocabulary.tokens_per_image)
    return summary
