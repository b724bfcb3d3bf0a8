"""Exact examples of the block pool, and what it refuses."""

from __future__ import annotations

import pytest

from momaserve.core.block_pool import BlockPool
from momaserve.errors import ConfigError


def test_blocks_are_handed_out_in_the_order_they_were_freed() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.free([2, 0])
    assert pool.num_free == 3
    assert pool.allocate(3) == [3, 2, 0]
    assert pool.num_free == 0


def test_allocates_all_or_none() -> None:
    pool = BlockPool(2)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    assert pool.allocate(0) == []
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(1) is None


def test_freeing_twice_is_caught() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool.free([0])
    with pytest.raises(AssertionError, match="block 0 is freed twice"):
        pool.free([0])


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_without_blocks_is_refused(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1 block, got {num_blocks}"):
        BlockPool(num_blocks)


def test_check_passes_on_a_true_account() -> None:
    pool = BlockPool(4)
    pool.allocate(3)
    pool.check([[0], [2, 1]])


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param([[0]], id="a lost block"),
        pytest.param([[0, 1], [1]], id="a shared block"),
        pytest.param([[0, 1, 1]], id="a block twice in a table"),
        pytest.param([[0, 0]], id="a block twice, one lost"),
        pytest.param([[0, 1, 2]], id="a free block in a table"),
    ],
)
def test_check_finds(tables: list[list[int]]) -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.check(tables)
