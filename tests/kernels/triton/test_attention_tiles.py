"""How attention is cut: sizes that fit, and enough programs to keep a device busy."""

from __future__ import annotations

import pytest

from momaserve.kernels.triton.attention_tiles import (
    MAX_SPLITS,
    decode_tiles,
    num_splits,
    prefill_tiles,
    scratch_shape,
)

MULTIPROCESSORS = 132


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("shared", [1, 2, 3, 8, 18])
def test_a_tile_holds_all_heads_that_share(itemsize: int, head_dim: int, shared: int) -> None:
    assert decode_tiles(shared, head_dim, itemsize).rows >= max(16, shared)
    for max_q in (2, 5, 16, 100, 4096):
        rows = prefill_tiles(max_q, shared, head_dim, itemsize).rows
        assert rows >= max(16, shared)
        assert rows & (rows - 1) == 0


def test_short_chunks_get_small_tiles() -> None:
    rows = [prefill_tiles(max_q, 1, 64, 2).rows for max_q in (2, 16, 17, 64, 65, 5000)]
    assert rows == [16, 16, 32, 64, 128, 128]


@pytest.mark.parametrize(
    ("batch", "head_dim", "max_len", "splits"),
    [
        (1, 64, 4096, 55),  # 880 programs, nearly the 1,024 that there may be
        (32, 64, 4096, 4),  # 2,048 of 2,112
        (32, 128, 4096, 2),  # 1,024 of 1,056
        (32, 64, 128, 2),  # no more than the positions are worth
        (32, 64, 16, 1),
        (256, 64, 4096, 1),  # 4,096 of 4,224 in two waves
    ],
)
def test_splits_fill_the_device(batch: int, head_dim: int, max_len: int, splits: int) -> None:
    tiles = decode_tiles(1, head_dim, 2)
    assert num_splits(batch, 16, max_len, MULTIPROCESSORS, tiles) == splits


def test_splits_leave_no_small_last_wave() -> None:
    """One wave and a bit would take as long as two."""
    tiles = decode_tiles(1, 64, 2)
    room = MULTIPROCESSORS * tiles.resident
    for batch in range(1, 300):
        splits = num_splits(batch, 16, 4096, MULTIPROCESSORS, tiles)
        assert 1 <= splits <= MAX_SPLITS
        programs = batch * 16 * splits
        waves = -(-programs // room)
        assert programs >= 0.75 * waves * room or splits > 48, batch


def test_scratch_rows_are_aligned() -> None:
    assert scratch_shape(3, 2, 4, 64) == (3, 2, 4, 68)
    assert scratch_shape(1, 1, 1, 128)[-1] * 4 % 16 == 0
