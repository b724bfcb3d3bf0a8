"""Exact examples of block tables and reservations."""

from __future__ import annotations

import pytest

from momaserve.core.kv_cache import KVCache


def test_a_table_grows_only_by_what_is_needed() -> None:
    cache = KVCache(num_blocks=8, block_size=4)
    cache.admit("a", 12)
    tables = []
    for num_tokens in (0, 1, 4, 5, 2, 12):
        cache.grow("a", num_tokens)
        tables.append(cache.block_ids("a"))
        cache.check()
    assert tables == [(), (0,), (0,), (0, 1), (0, 1), (0, 1, 2)]


def test_reservations_keep_room_for_those_that_run() -> None:
    cache = KVCache(num_blocks=5, block_size=4)
    cache.admit("a", 9)  # 3 blocks, none taken yet
    assert cache.num_free_blocks == 5
    assert cache.can_admit(8)
    assert not cache.can_admit(9)
    cache.admit("b", 8)
    cache.grow("b", 8)
    assert not cache.can_admit(1)
    cache.grow("a", 9)
    assert cache.block_ids("a") == (2, 3, 4)
    cache.check()


def test_blocks_are_freed_tail_first() -> None:
    cache = KVCache(num_blocks=3, block_size=1)
    cache.admit("a", 3)
    cache.grow("a", 3)
    cache.free("a")
    cache.admit("b", 3)
    cache.grow("b", 3)
    assert cache.block_ids("b") == (2, 1, 0)


def test_usage_counts_taken_blocks_not_reserved_ones() -> None:
    cache = KVCache(num_blocks=4, block_size=2)
    assert cache.usage == 0.0
    cache.admit("a", 8)
    assert cache.usage == 0.0
    cache.grow("a", 2)
    assert cache.usage == 0.25
    cache.grow("a", 8)
    assert cache.usage == 1.0
    cache.free("a")
    assert cache.usage == 0.0
    assert cache.can_admit(8)
    assert list(cache.request_ids) == []
    cache.check()


def test_misuse_is_caught() -> None:
    cache = KVCache(num_blocks=2, block_size=4)
    with pytest.raises(AssertionError, match="no room for 9 tokens"):
        cache.admit("a", 9)
    cache.admit("a", 4)
    with pytest.raises(AssertionError, match="admitted twice"):
        cache.admit("a", 4)
    with pytest.raises(AssertionError, match="grows to 2 blocks but reserved 1"):
        cache.grow("a", 5)
    with pytest.raises(KeyError):
        cache.block_ids("b")
    with pytest.raises(KeyError):
        cache.free("b")
    cache.check()


def test_check_finds_a_table_that_outgrew_its_reservation() -> None:
    cache = KVCache(num_blocks=2, block_size=4)
    cache.admit("a", 4)
    blocks = cache._pool.allocate(2)
    assert blocks is not None
    cache._tables["a"] += blocks
    with pytest.raises(AssertionError, match="outgrew"):
        cache.check()
