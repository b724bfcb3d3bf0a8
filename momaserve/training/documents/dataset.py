"""Encoded documents in one file, which says of what data and tokenizers they were made."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from momaserve.errors import DataError
from momaserve.tokens.prompt import TextPart
from momaserve.training.documents.document import Document
from momaserve.training.documents.hashing import seeded_hash
from momaserve.training.documents.pictures import LIMITS
from momaserve.training.documents.reader import read_records
from momaserve.training.documents.record import PicturePart, Skipped, UnusableError
from momaserve.training.documents.summary import Summary
from momaserve.training.run import save_tensors

_FORMAT = "1"
_TENSORS = {
    "token_ids": torch.int32,
    "offsets": torch.int64,
    "learnt": torch.bool,
    "keys": torch.int64,
}


@dataclass(frozen=True, slots=True)
class EncodedDocuments:
    """D documents one after another, T tokens in all."""

    token_ids: np.ndarray[Any, Any]
    """int32 [T]."""
    offsets: np.ndarray[Any, Any]
    """int64 [D + 1]; document i is token_ids[offsets[i]:offsets[i + 1]]."""
    learnt: np.ndarray[Any, Any]
    """bool [T]."""
    keys: np.ndarray[Any, Any]
    """int64 [D], hash of each document's content."""
    summary: Summary

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """int64 [D], tokens of each document."""
        return np.diff(self.offsets)

    @classmethod
    def collect(
        cls, documents: Iterable[Document | Skipped], tokens_per_image: int
    ) -> EncodedDocuments:
        """Gather a stream of documents, counting what it holds and what was skipped."""
        token_ids, offsets, learnt, keys = array("i"), array("q", [0]), bytearray(), array("q")
        summary = Summary()
        for document in documents:
            if isinstance(document, Skipped):
                summary.skips.add(document)
                continue
            token_ids.extend(document.token_ids)
            offsets.append(len(token_ids))
            learnt.extend(document.learnt)
            keys.append(document.key)
            summary.count(document, tokens_per_image)
        return cls(
            np.array(token_ids, dtype=np.int32),
            np.array(offsets, dtype=np.int64),
            np.frombuffer(bytes(learnt), dtype=np.bool_),
            np.array(keys, dtype=np.int64),
            summary,
        )

    def save(self, path: Path, fingerprint: Mapping[str, str]) -> None:
        """Write everything to a safetensors file (atomically)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: torch.from_numpy(getattr(self, name).copy()) for name in _TENSORS}
        metadata = {"format": _FORMAT, "fingerprint": json.dumps(dict(fingerprint))}
        save_tensors(tensors, path, {**metadata, "summary": self.summary.to_json()})

    @classmethod
    def load(cls, path: Path, fingerprint: Mapping[str, str]) -> EncodedDocuments:
        """Read what `save` wrote.

        Raises:
            DataError: the file is broken, or was made of something else than `fingerprint` says.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
            if metadata["format"] != _FORMAT:
                raise ValueError(f"format {metadata['format']}")
            stored = json.loads(metadata["fingerprint"])
            summary = Summary.from_json(metadata["summary"])
        except Exception as error:  # safetensors has error classes of its own
            raise DataError(
                f"{path} cannot be read ({error}); remove it to make it anew"
            ) from error
        changed = [name for name, value in fingerprint.items() if stored.get(name) != value]
        if changed:
            raise DataError(
                f"{path} was made with another {' and another '.join(changed)} than this run has: "
                "a run goes on with what it began with; choose another --out or remove this one"
            )
        for name, dtype in _TENSORS.items():
            if tensors[name].dtype != dtype or tensors[name].ndim != 1:
                raise DataError(f"{path} cannot be read: {name} is not {dtype} [N]")
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        offsets, num_tokens = arrays["offsets"], len(arrays["token_ids"])
        is_whole = len(offsets) == len(arrays["keys"]) + 1 and len(arrays["learnt"]) == num_tokens
        if (
            not is_whole
            or offsets[0] != 0
            or offsets[-1] != num_tokens
            or min(np.diff(offsets)) < 1
        ):
            raise DataError(f"{path} cannot be read: its parts do not fit together")
        return cls(summary=summary, **arrays)


def data_fingerprint(path: Path, seed: int) -> str:
    """Hash of all records that reading a data set gives: places, words and pictures' files.

    It stays when the data is moved as a whole or copied with new times, and when files come or go
    that are skipped anyway.

    Raises:
        DataError: no data set.
    """
    digest = hashlib.sha256()
    for record in read_records(path, seed):
        if isinstance(record, Skipped):
            continue
        _feed(digest, "record", record.where)
        for turn in record.turns:
            _feed(digest, "turn", turn.role or "")
            for part in turn.parts:
                if isinstance(part, TextPart):
                    _feed(digest, "text", part.text)
                else:
                    _feed(digest, "picture", _picture_digest(part))
    return digest.hexdigest()


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Hash of some files' contents. Raises DataError when one cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    return digest.hexdigest()


def _picture_digest(picture: PicturePart) -> str:
    try:
        return hashlib.sha256(picture.read(LIMITS.max_bytes)).hexdigest()
    except UnusableError as error:
        return error.reason


def _feed(digest: Any, *texts: str) -> None:
    """Add texts so that no other sequence of texts gives the same bytes."""
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)


def validation_mask(keys: np.ndarray[Any, Any], share: float, seed: int) -> np.ndarray[Any, Any]:
    """Which documents validate, bool [D], by a seeded hash of their content.

    A document's side depends on its content alone, but for sets so small that a side would be
    empty: then the lowest hash validates, or the highest is trained on.

    Raises:
        DataError: fewer than two different documents.
    """
    if len(np.unique(keys)) < 2:
        raise DataError(
            f"at least 2 different documents are needed, one to train on and one to validate: "
            f"the data has {len(np.unique(keys))}"
        )
    hashes = seeded_hash(f"{seed}/validation", keys.astype(np.uint64))
    chosen: np.ndarray[Any, Any] = hashes.astype(np.float64) < share * 2.0**64
    if not chosen.any():
        chosen = hashes == hashes.min()
    if chosen.all():
        chosen = hashes != hashes.max()
    return chosen
