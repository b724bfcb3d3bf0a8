"""Rows that drift away from what was trained on, one condition after another."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from momaserve.errors import DataError, PromptError
from momaserve.router_lab.corruption import (
    PICTURE_SHIFTS,
    TEXT_SHIFTS,
    Pixels,
    TextCorruption,
    german_names,
    in_german,
)
from momaserve.router_lab.documents import (
    PICTURE,
    TEXT,
    Piece,
    Pieces,
    documents_in,
    has_picture,
    joined,
    num_tokens,
    packed,
    turned_around,
)
from momaserve.router_lab.source import LabData
from momaserve.training.demo import encode_pictures
from momaserve.training.packing import PackedRows

CLEAN = "none"
"""The condition of rows as they are."""
_SHARES = (10, 30, 50, 70, 90)
"""Picture codes wanted among all tokens, in percent."""
_ORDERS = (25, 50, 100)
_GERMAN = (25, 50, 100)
_LENGTHS = (1, 2, 4, 8)
"""Lengths of rows, in those of training."""
_MAX_MISS = 10.0
"""Percentage points by which a share of pictures may be missed."""
_MAX_STEPS = 400
"""Of rows that are looked through for documents of a kind."""

Points = Callable[[Sequence[float]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Condition:
    """One severity of one shift."""

    shift: str
    severity: float
    unit: str
    batches: Sequence[PackedRows]


class Conditions:
    """Makes all conditions out of the same training documents, by seed."""

    def __init__(self, data: LabData, num_batches: int, seed: int, points: Points) -> None:
        self.data = data
        self.config = data.config
        self.skipped: dict[str, str] = {}
        """Conditions that the data cannot give, and why."""
        self._seed = f"{seed}/shift"
        self._points = points
        self._room = num_batches * data.num_rows * data.row_length
        self._stream = self._read()
        self._known: list[Pieces] = []
        self.documents = self._first_documents()

    def __iter__(self) -> Iterator[Condition]:
        yield self._condition(CLEAN, 0, "", self.documents)
        yield from self._pictures()
        yield from self._texts()
        yield from self._orders()
        yield from self._compositions()
        yield from self._lengths()

    def _read(self) -> Iterator[Pieces]:
        for step in range(_MAX_STEPS):
            yield from documents_in(self.data.short_rows(step), self.config, self._is_control)

    def _is_control(self, token: int) -> bool:
        return not self.config.modality_of(token) and not self.data.text.decode([token])

    def _all_documents(self) -> Iterator[Pieces]:
        """From the first on, as often as it is asked; each is read once."""
        for number in itertools.count():
            if number == len(self._known):
                following = next(self._stream, None)
                if following is None:
                    return
                self._known.append(following)
            yield self._known[number]

    def _first_documents(self) -> list[Pieces]:
        """About as many as fill the batches."""
        found: list[Pieces] = []
        room = self._room
        for document in self._all_documents():
            room -= num_tokens(document)[0]
            if room < 0 and found:
                break
            found.append(document)
        return found

    def _condition(
        self, shift: str, severity: float, unit: str, documents: Sequence[Pieces]
    ) -> Condition:
        batches = packed(documents, self.config, self.data.row_length, self.data.num_rows)
        return Condition(shift, severity, unit, batches)

    def _pictures(self) -> Iterator[Condition]:
        model, image = self.data.pictures, self.config.image
        pieces = itertools.chain.from_iterable(self.documents)
        order = sorted({piece.token_ids for piece in pieces if piece.kind == PICTURE})
        if model is None or image is None or not order:
            self.skipped["pictures"] = "there are none"
            return
        pixels = dict(self.data.find_pictures(set(order)))
        for codes in order:
            if codes not in pixels:  # drawn by the image tokenizer itself, or moved a little
                shown = model.decode(torch.tensor([codes]) - image.first_token_id)[0]
                values = ((shown + 1) * 127.5).round().to(torch.uint8)
                pixels[codes] = values.permute(1, 2, 0).numpy()
        for name, (corrupt, severities, unit) in PICTURE_SHIFTS.items():
            for severity in self._points(severities):
                made: list[Pixels] = [
                    corrupt(pixels[codes], severity, random.Random(f"{self._seed}/{name}/{i}"))
                    for i, codes in enumerate(order)
                ]
                ids = encode_pictures(model, np.stack(made), image.first_token_id)
                table = dict(zip(order, map(tuple, ids), strict=True))
                changed = self._changed(PICTURE, table.__getitem__)
                yield self._condition(name, severity, unit, changed)

    def _texts(self) -> Iterator[Condition]:
        shifts = dict(TEXT_SHIFTS)
        try:
            shifts["german names"] = (in_german(german_names()), _GERMAN, "names, %")
        except DataError as error:
            self.skipped["german names"] = str(error)
        for name, (corrupt, severities, unit) in shifts.items():
            for severity in self._points(severities):
                rng = random.Random(f"{self._seed}/{name}/{severity}")
                rewritten = self._rewriter(corrupt, severity, rng)
                yield self._condition(name, severity, unit, self._changed(TEXT, rewritten))

    def _rewriter(
        self, corrupt: TextCorruption, severity: float, rng: random.Random
    ) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
        text = self.data.text

        def rewritten(ids: tuple[int, ...]) -> tuple[int, ...]:
            try:
                return tuple(text.encode(corrupt(text.decode(ids), severity, rng))) or ids
            except PromptError:
                return ids  # it spells a control token now

        return rewritten

    def _changed(
        self, kind: str, change: Callable[[tuple[int, ...]], tuple[int, ...]]
    ) -> list[Pieces]:
        """The documents with all pieces of a kind replaced."""

        def one(piece: Piece) -> Piece:
            is_mine = piece.kind == kind
            return replace(piece, token_ids=change(piece.token_ids)) if is_mine else piece

        return [tuple(map(one, document)) for document in self.documents]

    def _orders(self) -> Iterator[Condition]:
        if not any(map(has_picture, self.documents)):
            self.skipped["modality order"] = "there are no pictures"
            return
        for share in self._points(_ORDERS):
            rng = random.Random(f"{self._seed}/order")
            turned = [
                turned_around(document) if 100 * rng.random() < share else document
                for document in self.documents
            ]
            yield self._condition("modality order", share, "documents turned around, %", turned)

    def _compositions(self) -> Iterator[Condition]:
        """Documents with and without pictures, chosen so that codes are a given share."""
        for share in self._points(_SHARES):
            documents = self._all_documents
            pools = {
                False: (each for each in documents() if not has_picture(each)),
                True: (each for each in documents() if has_picture(each)),
            }
            chosen: list[Pieces] = []
            tokens = codes = 0
            while tokens < self._room:
                document = next(pools[100 * codes <= share * tokens], None)
                if document is None:
                    break
                counts = num_tokens(document)
                tokens, codes = tokens + counts[0], codes + counts[1]
                chosen.append(document)
            reached = round(100 * codes / max(1, tokens), 1)
            if abs(reached - share) > _MAX_MISS or 2 * tokens < self._room:
                name = f"batch composition, {share} % pictures"
                self.skipped[name] = f"the documents give {reached} % of {tokens} tokens"
                continue
            yield self._condition("batch composition", reached, "picture codes, %", chosen)

    def _lengths(self) -> Iterator[Condition]:
        longest = self.config.max_position_embeddings
        lengths = [min(factor * self.data.row_length, longest) for factor in _LENGTHS]
        for length in self._points(list(dict.fromkeys(lengths))):
            num_rows = max(1, self.data.num_rows * self.data.row_length // int(length))
            batches = joined(self.documents, self.config, int(length), num_rows)
            if batches:
                yield Condition("sequence length", length, "tokens", batches)
