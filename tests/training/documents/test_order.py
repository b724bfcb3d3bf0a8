"""The order of documents: every document once an epoch, and any step from nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from momaserve.training.documents.dataset import EncodedDocuments
from momaserve.training.documents.document import Document
from momaserve.training.documents.hashing import seeded_hash
from momaserve.training.documents.order import DocumentOrder, first_fit, pack

CAPACITY = 12
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


def slow_first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for number, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[other] for other in row) + length <= capacity:
                row.append(number)
                break
        else:
            rows.append([number])
    return rows


def make_order(lengths: list[int], num_rows: int = 3, seed: int = 0) -> DocumentOrder:
    return DocumentOrder(np.array(lengths), row_length=CAPACITY, num_rows=num_rows, seed=seed)


def make_documents(lengths: list[int]) -> EncodedDocuments:
    """Document i is bos (0), then tokens that say i and where in it they stand; the last third of
    each is learnt."""
    found = []
    for number, length in enumerate(lengths):
        token_ids = [0, *(100 * (number + 1) + place for place in range(1, length))]
        learnt = [place > 0 and 3 * place >= 2 * length for place in range(length)]
        found.append(Document(token_ids, learnt, number, 0, False))
    return EncodedDocuments.collect(found, 0)


@given(LENGTHS)
def test_first_fit_is_that_of_the_definition(lengths: list[int]) -> None:
    assert first_fit(lengths, CAPACITY) == slow_first_fit(lengths, CAPACITY)


def test_first_fit_of_nothing_and_of_too_much() -> None:
    assert first_fit([], CAPACITY) == []
    with pytest.raises(ValueError, match="13 tokens in rows of 12"):
        first_fit([3, CAPACITY + 1], CAPACITY)


@given(LENGTHS, st.integers(1, 5), st.integers(0, 3))
def test_every_document_comes_once_an_epoch(lengths: list[int], num_rows: int, seed: int) -> None:
    order = make_order(lengths, num_rows, seed)
    rows = [row for step in range(12) for row in order.documents_of_step(step)]
    assert len(rows) == 12 * num_rows
    for row in rows:
        assert row and sum(lengths[number] for number in row) <= CAPACITY
    epoch = start = 0
    while start < len(rows):
        whole = order.rows_of_epoch(epoch)
        assert rows[start : start + len(whole)] == whole[: len(rows) - start]
        assert sorted(number for row in whole for number in row) == list(range(len(lengths)))
        epoch, start = epoch + 1, start + len(whole)


@given(LENGTHS, st.integers(1, 5), st.lists(st.integers(0, 40), max_size=5))
def test_any_step_is_the_same_from_nothing(
    lengths: list[int], num_rows: int, steps: list[int]
) -> None:
    order = make_order(lengths, num_rows)
    in_turn = [order.documents_of_step(step) for step in range(41)]
    for step in steps:
        assert make_order(lengths, num_rows).documents_of_step(step) == in_turn[step]
        assert order.documents_of_step(step) == in_turn[step]


def test_epochs_and_seeds_differ() -> None:
    lengths = [1 + number % 5 for number in range(50)]
    first = make_order(lengths, seed=0)
    assert first.rows_of_epoch(0) != first.rows_of_epoch(1)
    assert first.rows_of_epoch(0) != make_order(lengths, seed=1).rows_of_epoch(0)


def test_every_place_in_an_epoch_is_as_likely() -> None:
    """Over 3000 epochs of 10 documents, each comes first about 300 times."""
    order = make_order([CAPACITY] * 10, num_rows=1)
    firsts = Counter(order.rows_of_epoch(epoch)[0][0] for epoch in range(3000))
    assert set(firsts) == set(range(10))
    assert all(230 < count < 370 for count in firsts.values())


def test_hashes_stay_as_they_are() -> None:
    """A resumed run needs the order that it began with, whatever version it is resumed by."""
    found = seeded_hash("7/0", np.arange(3, dtype=np.uint64)).tolist()
    assert found == [15062101715424021598, 9797683756707644721, 5686060151624252651]
    assert make_order([3, 4, 5, 6, 7, 8], seed=7).documents_of_step(1) == [[5], [2, 4], [5, 1]]


def test_packed_rows() -> None:
    documents = make_documents([5, 4, 6])
    rows = pack(documents, [[1, 0], [2]], row_length=10, pad_id=9)
    assert rows.token_ids.tolist() == [
        [0, 201, 202, 203, 0, 101, 102, 103, 104, 9],
        [0, 301, 302, 303, 304, 305, 9, 9, 9, 9],
    ]
    assert rows.targets.tolist() == [
        [-100, -100, 203, -100, -100, -100, -100, 104, -100, -100],
        [-100, -100, -100, 304, 305, -100, -100, -100, -100, -100],
    ]
    assert rows.positions.tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3, 4, 0],
        [0, 1, 2, 3, 4, 5, 0, 0, 0, 0],
    ]
    assert rows.documents is not None
    assert rows.documents.tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1, 1, -1],
        [2, 2, 2, 2, 2, 2, -1, -1, -1, -1],
    ]
    assert rows.is_padding.tolist() == [[False] * 9 + [True], [False] * 6 + [True] * 4]


@given(LENGTHS)
def test_packing_loses_nothing(lengths: list[int]) -> None:
    documents = make_documents(lengths)
    plan = make_order(lengths).rows_of_epoch(0)
    rows = pack(documents, plan, CAPACITY, pad_id=0)
    assert int((~rows.is_padding).sum()) == sum(lengths)
    assert int((rows.targets >= 0).sum()) == documents.summary.num_learnt_tokens
    where = (rows.targets >= 0).nonzero()
    for row, place in where.tolist():
        assert rows.targets[row, place] == rows.token_ids[row, place + 1]
        assert rows.documents is not None
        assert rows.documents[row, place] == rows.documents[row, place + 1]
