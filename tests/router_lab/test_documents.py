"""Documents taken apart, changed and packed again."""

from __future__ import annotations

import torch

from momaserve.router_lab.documents import (
    CONTROL,
    PICTURE,
    TEXT,
    Piece,
    documents_in,
    has_picture,
    joined,
    num_tokens,
    packed,
    tokens_of,
    turned_around,
)
from tests.router_lab.factory import rows_of
from tests.training.factory import picture, tiny_config

CONFIG = tiny_config()
DRAWN = (0, 25, 26, 3, *picture(25), 2)
NAMED = (0, *picture(30), 3, 31, 32, 2)
CUT = (0, 27, 3, 21, 5, 6)


def is_control(token: int) -> bool:
    return token < 4


def test_documents_are_taken_apart_and_put_together_again() -> None:
    rows = rows_of(DRAWN, NAMED, learnt_from=[4, 8], padding=3)
    drawn, named = documents_in(rows, CONFIG, is_control)
    codes = picture(25)[1:-1]
    assert drawn == (
        Piece(CONTROL, (0,), False),
        Piece(TEXT, (25, 26), False),
        Piece(CONTROL, (3,), False),
        Piece(PICTURE, codes, True),
        Piece(CONTROL, (2,), True),
    )
    assert [piece.kind for piece in named] == [CONTROL, PICTURE, CONTROL, TEXT, CONTROL]
    assert tokens_of(drawn, CONFIG) == (list(DRAWN), [False] * 4 + [True] * 7)
    assert tokens_of(named, CONFIG)[0] == list(NAMED)
    assert num_tokens(drawn) == (len(DRAWN), 4)
    assert has_picture(drawn)
    assert not has_picture(drawn[:3])


def test_words_break_where_learning_begins() -> None:
    (document,) = documents_in(rows_of((0, 22, 23, 24, 2), learnt_from=[3]), CONFIG, is_control)
    assert [piece.token_ids for piece in document] == [(0,), (22, 23), (24,), (2,)]
    assert [piece.is_learnt for piece in document] == [False, False, True, True]


def test_a_picture_that_was_cut_off_is_left_out() -> None:
    (document,) = documents_in(rows_of(CUT), CONFIG, is_control)
    assert tokens_of(document, CONFIG)[0] == [0, 27, 3]


def test_packing_keeps_documents_apart() -> None:
    rows = rows_of(DRAWN, NAMED, learnt_from=[4, 8])
    documents = documents_in(rows, CONFIG, is_control)
    batches = packed(documents * 2, CONFIG, row_length=24, num_rows=1)
    assert len(batches) == 2
    assert torch.equal(batches[0].token_ids, torch.tensor([[*DRAWN, *NAMED, 1, 1]]))
    assert batches[0].documents is not None
    assert batches[0].documents[0].tolist() == [0] * 11 + [1] * 11 + [-1] * 2
    assert batches[0].targets[0, :22].tolist() == rows.targets[0].tolist()
    assert batches[0].positions[0].tolist() == [*range(11), *range(11), 0, 0]


def test_what_is_too_long_is_cut() -> None:
    (batch,) = packed(documents_in(rows_of(DRAWN), CONFIG, is_control), CONFIG, 6, 2)
    assert batch.token_ids.tolist() == [list(DRAWN[:6])]


def test_joined_documents_see_all_before_them() -> None:
    documents = documents_in(rows_of(DRAWN, NAMED), CONFIG, is_control)
    batches = joined(documents * 3, CONFIG, row_length=16, num_rows=2)
    (batch,) = batches[:1]
    assert batch.token_ids.shape == (2, 16)
    assert batch.token_ids[0].tolist() == [*DRAWN, *NAMED[1:6]]  # one bos, and cut off
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0] * 16, [1] * 16]
    assert batch.positions.tolist() == [list(range(16))] * 2
    assert not bool(batch.is_padding.any())


def test_words_and_pictures_change_places() -> None:
    (drawn,) = documents_in(rows_of(DRAWN, learnt_from=[4]), CONFIG, is_control)
    ids, marks = tokens_of(turned_around(drawn), CONFIG)
    assert ids == [0, *picture(25), 3, 25, 26, 2]
    assert marks == [False] * 8 + [True] * 3  # what follows the separator is learnt
    assert turned_around(turned_around(drawn)) == drawn
