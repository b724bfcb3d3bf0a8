"""Documents out of packed rows, and packed again otherwise: what the shift study works on.

A document is taken apart into pieces: runs of words, whole pictures, and single control tokens
(bos, separator, eos) that hold it together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from momaserve.models.config import ModelConfig
from momaserve.router_lab.losses import documents_of_tokens
from momaserve.training.documents.dataset import EncodedDocuments
from momaserve.training.documents.order import first_fit, pack
from momaserve.training.documents.summary import Summary
from momaserve.training.packing import PackedRows

TEXT, PICTURE, CONTROL = "text", "picture", "control"


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens that belong together. A picture's are its codes, without begin and end."""

    kind: str
    """TEXT, PICTURE or CONTROL."""
    token_ids: tuple[int, ...]
    is_learnt: bool


Pieces = tuple[Piece, ...]
"""A document."""


def documents_in(
    rows: PackedRows, config: ModelConfig, is_control: Callable[[int], bool]
) -> list[Pieces]:
    """All documents of some rows, in order; what was cut off within a picture loses that."""
    owner = documents_of_tokens(rows).cpu().numpy()
    ids = rows.token_ids.flatten().cpu().numpy()
    targets = rows.targets.cpu().numpy()
    learnt = np.zeros(targets.shape, dtype=bool)
    learnt[:, 1:] = targets[:, :-1] >= 0
    marks = learnt.flatten()
    found = []
    for number in range(int(owner.max(initial=-1)) + 1):
        places = np.flatnonzero(owner == number)
        tokens, mine = ids[places].tolist(), marks[places].tolist()
        found.append(tuple(_pieces(tokens, mine, config, is_control)))
    return found


def _pieces(
    ids: list[int], learnt: list[bool], config: ModelConfig, is_control: Callable[[int], bool]
) -> Iterator[Piece]:
    image, place = config.image, 0
    while place < len(ids):
        if image is not None and ids[place] == image.begin_token_id:
            stop = place + 1 + image.tokens_per_image
            if stop >= len(ids):
                return
            yield Piece(PICTURE, tuple(ids[place + 1 : stop]), learnt[place])
            place = stop + 1
        elif is_control(ids[place]):
            yield Piece(CONTROL, (ids[place],), learnt[place])
            place += 1
        else:
            stop = place + 1
            while stop < len(ids) and learnt[stop] == learnt[place] and not is_control(ids[stop]):
                stop += 1
            yield Piece(TEXT, tuple(ids[place:stop]), learnt[place])
            place = stop


def tokens_of(document: Pieces, config: ModelConfig) -> tuple[list[int], list[bool]]:
    """Ids and marks of a document."""
    ids: list[int] = []
    for piece in document:
        if piece.kind == PICTURE:
            assert config.image is not None
            span = (config.image.begin_token_id, *piece.token_ids, config.image.end_token_id)
            ids += span
        else:
            ids += piece.token_ids
    lengths = [len(p.token_ids) + 2 * (p.kind == PICTURE) for p in document]
    marks = [p.is_learnt for p, n in zip(document, lengths, strict=True) for _ in range(n)]
    return ids, marks


def packed(
    documents: Sequence[Pieces], config: ModelConfig, row_length: int, num_rows: int
) -> list[PackedRows]:
    """Rows of whole documents, each blind to its neighbours; too long ones are cut off."""
    tokens = [tokens_of(document, config) for document in documents]
    encoded = _encoded([(ids[:row_length], marks[:row_length]) for ids, marks in tokens])
    rows = first_fit(encoded.lengths.tolist(), row_length)
    starts = range(0, len(rows), num_rows)
    pad = config.pad_token_id
    return [pack(encoded, rows[start : start + num_rows], row_length, pad) for start in starts]


def joined(
    documents: Sequence[Pieces], config: ModelConfig, row_length: int, num_rows: int
) -> list[PackedRows]:
    """Rows in which one document goes on from another, each token seeing all before it."""
    rows: list[tuple[list[int], list[bool]]] = [([], [])]
    for document in documents:
        ids, marks = rows[-1]
        more_ids, more_marks = tokens_of(document, config)
        skipped = int(bool(ids) and more_ids[:1] == [config.bos_token_id])
        ids += more_ids[skipped:]
        marks += more_marks[skipped:]
        if len(ids) >= row_length:
            rows.append(([], []))
    whole = [(ids[:row_length], marks[:row_length]) for ids, marks in rows[:-1]]
    starts = range(0, len(whole), num_rows)
    batches = []
    for start in starts:
        encoded = _encoded(whole[start : start + num_rows])
        numbers = [[i] for i in range(len(encoded.keys))]
        batches.append(pack(encoded, numbers, row_length, config.pad_token_id))
    return batches


def _encoded(documents: Sequence[tuple[list[int], list[bool]]]) -> EncodedDocuments:
    lengths = [len(ids) for ids, _ in documents]
    return EncodedDocuments(
        token_ids=np.array(list(itertools.chain.from_iterable(d[0] for d in documents)), np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))),
        learnt=np.array(list(itertools.chain.from_iterable(d[1] for d in documents)), np.bool_),
        keys=np.zeros(len(lengths), np.int64),
        summary=Summary(),
    )


def turned_around(document: Pieces) -> Pieces:
    """Words and pictures in reverse order, in the places that they leave each other.

    Control tokens stay where they are, and what is learnt is told by the place.
    """
    places = [i for i, piece in enumerate(document) if piece.kind != CONTROL]
    turned = list(document)
    for place, other in zip(places, reversed(places), strict=True):
        turned[place] = replace(document[other], is_learnt=document[place].is_learnt)
    return tuple(turned)


def has_picture(document: Pieces) -> bool:
    return any(piece.kind == PICTURE for piece in document)


def num_tokens(document: Pieces) -> tuple[int, int]:
    """All tokens of a document, and picture codes among them."""
    codes = sum(len(piece.token_ids) for piece in document if piece.kind == PICTURE)
    pictures = sum(piece.kind == PICTURE for piece in document)
    return sum(len(piece.token_ids) for piece in document) + 2 * pictures, codes
