"""Which documents a step trains on: a pure function of seed, step and the documents' lengths.

The documents of an epoch are permuted, and packed first-fit into rows; the rows of all epochs
follow one another, and a step takes the next `num_rows` of them. Nothing is drawn as training
goes on, so a run resumes at any step without a state, and every epoch has each document once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from momaserve.training.documents.dataset import EncodedDocuments
from momaserve.training.documents.hashing import seeded_hash
from momaserve.training.packing import PackedRows

_KEPT_EPOCHS = 2
"""A step may end one epoch and begin the next; a short epoch is cheap to make again."""


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of numbers of documents: each goes into the first row that has room for it.

    Raises:
        ValueError: a document is longer than `capacity`.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a document of {max(lengths)} tokens in rows of {capacity}")
    # First fit leaves at most one row half empty, so there are never more rows than this.
    num_rows = min(len(lengths), 2 * -(-sum(lengths) // capacity) + 1)
    size = 1 << max(0, num_rows - 1).bit_length()
    room = [capacity] * (2 * size)  # a heap-shaped tree: the most room in any row below a node
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for number, length in enumerate(lengths):
        node = 1
        while node < size:
            node *= 2
            if room[node] < length:
                node += 1
        rows[node - size].append(number)
        room[node] -= length
        while node > 1:
            node //= 2
            most = max(room[2 * node], room[2 * node + 1])
            if most == room[node]:
                break
            room[node] = most
    return [row for row in rows if row]


class DocumentOrder:
    """The endless sequence of rows over D documents, and the steps that it is cut into.

    Keeps what it has computed; answers are the same in whatever order they are asked for.
    """

    def __init__(
        self, lengths: np.ndarray[Any, Any], *, row_length: int, num_rows: int, seed: int
    ) -> None:
        """`lengths`: int [D], each from 1 to `row_length`, D >= 1."""
        self.lengths = lengths
        self.row_length = row_length
        self.num_rows = num_rows
        self.seed = seed
        self._first_rows = [0]  # of each epoch that is known, and of the one after it
        self._epochs: OrderedDict[int, list[list[int]]] = OrderedDict()

    def rows_of_epoch(self, epoch: int) -> list[list[int]]:
        """Numbers of the documents in each row of an epoch."""
        if epoch not in self._epochs:
            numbers = np.arange(len(self.lengths), dtype=np.uint64)
            order = np.argsort(seeded_hash(f"{self.seed}/{epoch}", numbers), kind="stable")
            rows = first_fit(self.lengths[order].tolist(), self.row_length)
            numbered = order.tolist()
            self._epochs[epoch] = [[numbered[place] for place in row] for row in rows]
            if len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def documents_of_step(self, step: int) -> list[list[int]]:
        """Numbers of the documents in each of the step's `num_rows` rows."""
        row = step * self.num_rows
        while self._first_rows[-1] <= row:
            known = len(self._first_rows) - 1
            self._first_rows.append(self._first_rows[-1] + len(self.rows_of_epoch(known)))
        epoch = bisect_right(self._first_rows, row) - 1
        start = row - self._first_rows[epoch]
        found: list[list[int]] = []
        while len(found) < self.num_rows:
            found += self.rows_of_epoch(epoch)[start : start + self.num_rows - len(found)]
            epoch, start = epoch + 1, 0
        return found


def pack(
    documents: EncodedDocuments, rows: Sequence[Sequence[int]], row_length: int, pad_id: int
) -> PackedRows:
    """The rows of some numbers of documents, each blind to its neighbours."""
    shape = (len(rows), row_length)
    token_ids = np.full(shape, pad_id, dtype=np.int64)
    learnt = np.zeros(shape, dtype=bool)
    positions = np.zeros(shape, dtype=np.int64)
    numbers = np.full(shape, -1, dtype=np.int64)
    number = 0
    for row, inside in enumerate(rows):
        place = 0
        for document in inside:
            start, stop = documents.offsets[document : document + 2].tolist()
            span = slice(place, place + stop - start)
            token_ids[row, span] = documents.token_ids[start:stop]
            learnt[row, span] = documents.learnt[start:stop]
            positions[row, span] = np.arange(stop - start)
            numbers[row, span] = number
            place, number = span.stop, number + 1
    targets = np.full(shape, -100, dtype=np.int64)
    targets[:, :-1] = np.where(learnt[:, 1:], token_ids[:, 1:], -100)  # bos is never learnt
    return PackedRows(
        token_ids=torch.from_numpy(token_ids),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        documents=torch.from_numpy(numbers),
        is_padding=torch.from_numpy(numbers < 0),
    )
