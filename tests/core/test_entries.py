"""Exact examples of what depth-routed layers keep: room, settling, sharing, releasing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from momaserve.core.entries import EntryShape
from momaserve.core.kv_cache import KVCache
from momaserve.request import TokenSequence
from tests.core.factory import make_sequence

SHAPE = EntryShape(per_token=3, per_block=6)
"""Three depth-routed layers; blocks of three tokens in two plain ones."""


def make_cache(num_blocks: int = 20, *, prefix_caching: bool = True) -> KVCache:
    return KVCache(num_blocks, 3, prefix_caching=prefix_caching, entries=SHAPE)


def compute(cache: KVCache, sequence: TokenSequence, count: int) -> list[tuple[int, int]]:
    """Puts `count` more tokens into a step that is not settled yet; returns the copies."""
    copies = cache.grow(sequence, sequence.num_computed_tokens + count)
    assert copies is not None
    cache.advance(sequence, count)
    return copies


def step(cache: KVCache, sequence: TokenSequence, counts: Sequence[int]) -> None:
    """Computes tokens of which each is taken by so many layers."""
    compute(cache, sequence, len(counts))
    cache.settle(1, [counts])
    cache.check([sequence])


def test_blocks_for_all_that_every_layer_may_keep() -> None:
    cache = make_cache()
    assert [cache.blocks_for(n) for n in (0, 1, 2, 3, 4, 6)] == [0, 2, 2, 3, 4, 5]
    assert [cache.tokens_in(n) for n in (0, 1, 2, 3, 4, 5)] == [0, 0, 2, 3, 4, 6]
    plain = KVCache(4, 3)
    assert [plain.tokens_in(n) for n in (0, 1, 4)] == [0, 3, 12]


def test_room_for_the_most_is_taken_and_what_was_not_needed_given_back() -> None:
    cache, a = make_cache(), make_sequence(range(9))
    assert cache.num_new_blocks(a, 6) == 2 + 3
    compute(cache, a, 6)
    assert (len(a.blocks), len(a.entry_blocks)) == (2, 3)
    assert (a.num_entries, a.max_num_entries) == (0, 18)
    cache.settle(1, [[3, 0, 0, 1, 2, 1]])
    assert (a.num_entries, a.max_num_entries, len(a.entry_blocks)) == (7, 7, 2)
    cache.check([a])
    # Five entries fit: one token may have room in the block that is there.
    step(cache, a, [0])
    assert len(a.entry_blocks) == 2
    step(cache, a, [3])
    assert (a.num_entries, len(a.entry_blocks)) == (10, 2)
    assert cache.num_new_blocks(a, 9) == 1
    cache.release(a)
    assert cache.num_free_blocks == 20
    assert (a.num_entries, a.max_num_entries, a.entry_blocks) == (0, 0, [])


def test_one_more_token_finds_its_slot_only_with_room_for_its_entries() -> None:
    cache, a = make_cache(), make_sequence(range(3))
    compute(cache, a, 1)
    assert len(a.entry_blocks) == 1
    cache.settle(1, [[3]])
    assert cache.take_slot(a)  # entries 3 to 5
    assert not cache.take_slot(a)  # entries 6 to 8, if all are taken
    cache.settle(1, [[1]])
    assert not cache.take_slot(a)  # 4 are there, and 3 more do not fit for sure
    compute(cache, a, 1)
    cache.settle(1, [[2]])
    assert (a.num_entries, len(a.entry_blocks)) == (6, 1)
    cache.check([a])


def test_each_block_holds_the_blocks_of_its_own_entries() -> None:
    cache, a = make_cache(), make_sequence(range(9))
    step(cache, a, [3, 3, 1, 0, 0, 0, 3, 2, 1])  # 7 entries, none, 6
    first, second, third = a.blocks
    pool = cache._pool
    assert pool.backing(first) == tuple(a.entry_blocks[:2])
    assert pool.backing(second) == ()
    assert pool.backing(third) == tuple(a.entry_blocks[1:])


def test_a_prefix_brings_its_entries_along_and_a_table_of_its_own_begins() -> None:
    cache, a = make_cache(), make_sequence(range(9))
    step(cache, a, [3, 3, 1, 0, 0, 0, 3, 2, 1])
    shared = a.blocks[:2]
    cache.release(a)
    assert cache.num_free_blocks == 20
    b = make_sequence([*range(6), 50, 51])
    assert cache.take_hits(b) == 6
    assert b.blocks == shared
    assert (b.entry_blocks, b.num_entries) == ([], 0)
    assert cache.num_free_blocks == 20 - 2 - 2  # two blocks of entries with the first of them
    cache.check([b])
    step(cache, b, [1, 1])
    assert (b.num_entries, len(b.entry_blocks)) == (2, 1)
    cache.release(b)
    # All is forgotten when room is needed, entries too.
    c = make_sequence(range(100, 130), shared=False)
    assert cache.grow(c, 24) == []
    cache.check([c])


def test_who_shares_a_block_in_flight_keeps_all_that_its_entries_may_lie_in() -> None:
    cache, a, b = make_cache(), make_sequence(range(4)), make_sequence(range(4))
    compute(cache, a, 4)
    assert cache.take_hits(b) == 3
    entries = list(a.entry_blocks)
    cache.release(a)
    assert cache._pool.backing(b.blocks[0]) == tuple(entries)
    cache.settle(1, [[1, 1, 1, 1]])
    cache.check([b])
    assert cache.num_free_blocks == 20 - 1 - len(entries)
    cache.release(b)
    assert cache.num_free_blocks == 20


def test_a_copy_of_a_block_in_flight_keeps_them_as_well() -> None:
    cache, a, b = make_cache(), make_sequence(range(4)), make_sequence(range(4))
    compute(cache, a, 4)
    cache.fork(a, b)
    a.token_ids.append(7)
    b.token_ids.append(8)
    ((source, target),) = compute(cache, a, 1)  # it writes first, so it takes the copy
    assert (b.blocks[1], a.blocks[1]) == (source, target)
    possible = set(a.entry_blocks[:2])
    assert possible <= set(cache._pool.backing(source)) & set(cache._pool.backing(target))
    assert compute(cache, b, 1) == []
    cache.settle(1, [[3, 3, 3, 3]])
    cache.settle(2, [[2], [1]])
    assert (a.num_entries, b.num_entries) == (14, 1)
    cache.check([a, b])
    cache.release(a)
    cache.check([b])
    assert possible <= set(cache._pool.backing(source))
    cache.release(b)
    assert cache.num_free_blocks == 20


def test_what_was_reserved_is_not_given_back() -> None:
    cache, a = make_cache(), make_sequence(range(9))
    assert cache.reserve(a, 8) == []
    assert (len(a.blocks), len(a.entry_blocks)) == (3, 4)
    step(cache, a, [0, 0, 0])
    assert len(a.entry_blocks) == 3  # five tokens are to come
    step(cache, a, [3, 3, 3, 3])
    assert len(a.entry_blocks) == 3
    cache.release(a)
    assert a.num_reserved_tokens == 0
    assert cache.num_free_blocks == 20


def test_nobody_asks_what_a_failed_step_kept() -> None:
    cache, a, b = make_cache(), make_sequence(range(4)), make_sequence(range(50, 54))
    compute(cache, a, 4)
    compute(cache, b, 4)
    for sequence in (a, b):
        cache.forget(sequence)
        cache.release(sequence)
    cache.settle(2, None)
    assert cache.num_free_blocks == 20
    step(cache, a, [1, 1, 1, 1])


def test_counts_must_be_those_of_the_step() -> None:
    cache, a = make_cache(), make_sequence(range(4))
    compute(cache, a, 4)
    with pytest.raises(AssertionError):
        cache.settle(2, [[1, 1, 1, 1]])
    with pytest.raises(AssertionError):
        cache.settle(1, [[1, 1, 1]])


def test_nothing_changes_when_entries_have_no_room() -> None:
    cache, a = make_cache(4), make_sequence(range(9))
    assert cache.grow(a, 6) is None
    assert (a.blocks, a.entry_blocks, cache.num_free_blocks) == ([], [], 4)
    assert cache.grow(a, 4) == []
