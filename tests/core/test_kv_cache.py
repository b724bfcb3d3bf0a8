"""Exact examples of block tables: growth, hits, forks, copies on write, release."""

from __future__ import annotations

import pytest

from momaserve.core.kv_cache import KVCache
from momaserve.request import TokenSequence
from tests.core.factory import make_sequence


def compute(cache: KVCache, sequence: TokenSequence, num_tokens: int) -> list[tuple[int, int]]:
    """What the scheduler does to compute the first `num_tokens` tokens."""
    copies = cache.grow(sequence, num_tokens)
    assert copies is not None
    sequence.num_computed_tokens = num_tokens
    cache.commit(sequence)
    return copies


def test_a_table_grows_only_by_what_is_needed() -> None:
    cache, a = KVCache(8, 4), make_sequence(range(12))
    tables = []
    for num_tokens in (0, 1, 4, 5, 12):
        assert cache.num_new_blocks(a, num_tokens) == cache.blocks_for(num_tokens) - len(a.blocks)
        assert compute(cache, a, num_tokens) == []
        tables.append(list(a.blocks))
        cache.check([a])
    assert tables == [[], [0], [0], [0, 1], [0, 1, 2]]


def test_growing_without_room_changes_nothing() -> None:
    cache, a, b = KVCache(3, 4), make_sequence(range(12)), make_sequence(range(50, 58))
    compute(cache, a, 5)
    assert cache.grow(b, 8) is None
    assert b.blocks == []
    assert cache.num_free_blocks == 1
    cache.check([a, b])


def test_blocks_are_freed_tail_first() -> None:
    cache, a, b = KVCache(3, 1), make_sequence(range(3), shared=False), make_sequence(range(3))
    compute(cache, a, 3)
    cache.release(a)
    assert (a.blocks, a.num_computed_tokens, a.num_committed_blocks) == ([], 0, 0)
    cache.grow(b, 3)
    assert b.blocks == [2, 1, 0]


def test_of_what_is_remembered_the_tail_is_evicted_first() -> None:
    cache, a, b = KVCache(4, 2), make_sequence([1, 2, 3, 4, 5, 6]), make_sequence([7, 8, 9, 10])
    compute(cache, a, 6)
    cache.release(a)
    assert cache.num_cached_blocks == 3
    compute(cache, b, 4)  # takes the blank block 3, then a's last
    assert b.blocks == [3, 2]
    again = make_sequence([1, 2, 3, 4, 5, 6, 7])
    assert cache.find_hits(again) == [0, 1]


def test_the_prefix_that_was_used_last_is_evicted_last() -> None:
    cache = KVCache(4, 2)
    a, b = make_sequence([1, 2, 3]), make_sequence([4, 5, 6])
    for sequence in (a, b):
        compute(cache, sequence, 2)
    cache.release(a)
    cache.release(b)
    assert cache.take_hits(a) == 2  # a is used again, and given back
    cache.release(a)
    other = make_sequence(range(10, 16))
    compute(cache, other, 6)
    assert cache.find_hits(a) == [0]
    assert cache.find_hits(b) == []


def test_usage_counts_held_blocks_not_remembered_ones() -> None:
    cache, a = KVCache(4, 2), make_sequence(range(6))
    assert cache.usage == 0.0
    compute(cache, a, 2)
    assert (cache.usage, cache.num_free_blocks, cache.num_cached_blocks) == (0.25, 3, 1)
    compute(cache, a, 6)
    assert (cache.usage, cache.num_free_blocks, cache.num_cached_blocks) == (0.75, 1, 3)
    cache.release(a)
    assert (cache.usage, cache.num_free_blocks, cache.num_cached_blocks) == (0.0, 4, 3)
    cache.check([])


@pytest.mark.parametrize(
    ("num_tokens", "hits"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (40, 3)]
)
def test_hits_never_cover_the_last_token(num_tokens: int, hits: int) -> None:
    cache, a = KVCache(16, 4), make_sequence(range(12))
    compute(cache, a, 12)
    b = make_sequence(range(num_tokens))
    assert cache.find_hits(b) == [0, 1, 2][:hits]
    assert cache.take_hits(b) == 4 * hits
    assert b.num_computed_tokens == 4 * hits < num_tokens
    assert b.num_committed_blocks == hits
    cache.check([a, b])


@pytest.mark.parametrize(("limit", "hits"), [(None, 2), (8, 2), (7, 1), (3, 0), (0, 0)])
def test_a_sequence_may_ask_for_less_than_is_there(limit: int | None, hits: int) -> None:
    cache, a, b = KVCache(8, 4), make_sequence(range(12)), make_sequence(range(12))
    compute(cache, a, 12)
    b.max_cached_tokens = limit
    assert cache.take_hits(b) == 4 * hits
    cache.check([a, b])


def test_only_full_blocks_that_are_computed_are_found() -> None:
    cache, a, b = KVCache(8, 4), make_sequence(range(12)), make_sequence(range(12))
    compute(cache, a, 7)
    assert cache.find_hits(b) == [0]
    compute(cache, a, 8)
    assert cache.find_hits(b) == [0, 1]


def test_tokens_that_are_not_known_yet_are_not_offered() -> None:
    cache, a = KVCache(8, 2), make_sequence([1, 2, 3])
    assert cache.grow(a, 4) == []
    a.num_computed_tokens = 4  # the fourth is being sampled
    cache.commit(a)
    assert cache.num_cached_blocks == 1
    a.token_ids.append(4)
    cache.commit(a)
    assert cache.num_cached_blocks == 2
    assert cache.find_hits(make_sequence([1, 2, 3, 4, 5])) == [0, 1]


def test_hits_may_be_taken_later_at_a_block_s_end_only() -> None:
    cache, a, b = KVCache(16, 4), make_sequence(range(20)), make_sequence(range(20))
    compute(cache, a, 4)
    cache.take_hits(b)
    compute(cache, a, 20)
    compute(cache, b, 6)
    assert cache.take_hits(b) == 0  # it writes to its second block already
    compute(cache, b, 8)
    assert cache.take_hits(b) == 8
    assert b.blocks == [0, 5, 2, 3]
    assert b.num_computed_tokens == 16
    cache.check([a, b])


def test_looking_for_hits_in_vain_does_not_stop_a_block_from_being_offered() -> None:
    cache, a = KVCache(8, 4), make_sequence(range(12))
    compute(cache, a, 6)
    assert cache.take_hits(a) == 0
    assert a.num_committed_blocks == 1  # the second one is not full yet
    compute(cache, a, 12)
    assert cache.find_hits(make_sequence(range(13))) == [0, 1, 2]


def test_hits_end_at_the_first_block_that_is_gone() -> None:
    cache, a = KVCache(4, 2), make_sequence(range(8))
    compute(cache, a, 8)
    cache.forget(with_blocks(a, [1]))
    assert cache.find_hits(make_sequence(range(9))) == [0]


def with_blocks(sequence: TokenSequence, blocks: list[int]) -> TokenSequence:
    """The same tokens, but with other blocks."""
    other = make_sequence(sequence.token_ids)
    other.blocks = blocks
    return other


def test_hits_are_held_by_both() -> None:
    cache, a, b = KVCache(3, 2), make_sequence([1, 2, 3]), make_sequence([1, 2, 4])
    compute(cache, a, 3)
    cache.take_hits(b)
    compute(cache, b, 3)
    assert (a.blocks, b.blocks) == ([0, 1], [0, 2])
    cache.check([a, b])
    cache.release(a)
    assert cache.num_free_blocks == 1
    cache.check([b])


def test_without_a_root_key_or_without_caching_nothing_is_shared() -> None:
    cache = KVCache(8, 2)
    compute(cache, make_sequence(range(4), shared=False), 4)
    compute(cache, make_sequence(range(4)), 4)
    assert cache.num_cached_blocks == 2
    assert cache.find_hits(make_sequence(range(5), shared=False)) == []
    off = KVCache(8, 2, prefix_caching=False)
    compute(off, make_sequence(range(4)), 4)
    assert off.num_cached_blocks == 0
    assert off.find_hits(make_sequence(range(5))) == []


def test_a_fork_shares_all_blocks_and_copies_the_last_one_once_each_but_for_the_last_holder() -> (
    None
):
    cache = KVCache(8, 4)
    a, b, c = (make_sequence(range(6)) for _ in range(3))
    compute(cache, a, 6)
    cache.fork(a, b)
    cache.fork(a, c)
    assert a.blocks == b.blocks == c.blocks == [0, 1]
    assert b.num_computed_tokens == 6
    assert b.num_committed_blocks == 1
    assert b.block_keys == a.block_keys
    assert b.block_keys is not a.block_keys
    cache.check([a, b, c])
    for sequence, token in ((a, 10), (b, 11), (c, 12)):
        sequence.token_ids.append(token)
    assert cache.num_new_blocks(a, 7) == 1
    assert compute(cache, a, 7) == [(1, 2)]
    assert compute(cache, b, 7) == [(1, 3)]
    assert cache.num_new_blocks(c, 7) == 0
    assert compute(cache, c, 7) == []  # it is the last one
    assert [s.blocks for s in (a, b, c)] == [[0, 2], [0, 3], [0, 1]]
    cache.check([a, b, c])


def test_a_fork_at_a_block_s_end_copies_nothing() -> None:
    cache, a, b = KVCache(8, 4), make_sequence(range(8)), make_sequence(range(8))
    compute(cache, a, 8)
    cache.fork(a, b)
    for sequence in (a, b):
        sequence.token_ids.append(20)
        assert compute(cache, sequence, 9) == []
    assert (a.blocks, b.blocks) == ([0, 1, 2], [0, 1, 3])


def test_a_copy_needs_a_block() -> None:
    cache, a, b = KVCache(2, 4), make_sequence(range(6)), make_sequence(range(6))
    compute(cache, a, 6)
    cache.fork(a, b)
    assert cache.grow(a, 7) is None
    assert a.blocks == b.blocks == [0, 1]
    cache.release(b)
    assert cache.grow(a, 7) == []
    cache.check([a])


def test_a_copy_and_new_blocks_come_together() -> None:
    cache, a, b = KVCache(8, 2), make_sequence(range(3)), make_sequence(range(3))
    compute(cache, a, 3)
    cache.fork(a, b)
    a.token_ids += range(10, 15)
    assert cache.num_new_blocks(a, 8) == 3
    assert cache.grow(a, 8) == [(1, 4)]
    assert a.blocks == [0, 4, 2, 3]
    cache.check([a, b])


def test_the_shared_block_is_copied_even_if_the_table_goes_on_behind_it() -> None:
    """A request that was preempted too often has room for its whole course from the start."""
    cache, a, b = KVCache(8, 4), make_sequence(range(6)), make_sequence(range(6))
    cache.grow(a, 16)
    compute(cache, a, 6)
    cache.fork(a, b)
    assert (a.blocks, b.blocks) == ([0, 1, 2, 3], [0, 1])
    a.token_ids.append(20)
    assert compute(cache, a, 7) == [(1, 4)]
    assert a.blocks == [0, 4, 2, 3]
    assert compute(cache, b, 6) == []
    cache.check([a, b])


def test_forgotten_blocks_are_found_no_more() -> None:
    cache, a, b = KVCache(8, 2), make_sequence(range(5)), make_sequence(range(5))
    compute(cache, a, 5)
    cache.take_hits(b)
    cache.forget(a)
    assert cache.num_cached_blocks == 0
    cache.release(a)
    cache.release(b)
    assert cache.find_hits(b) == []
    cache.check([])


def test_release_forgets_how_much_was_offered() -> None:
    cache, a = KVCache(3, 2), make_sequence(range(6))
    compute(cache, a, 6)
    cache.release(a)
    other = make_sequence(range(10, 16))
    compute(cache, other, 6)  # everything of a is evicted
    cache.release(other)
    compute(cache, a, 6)
    assert cache.find_hits(make_sequence(range(7))) == a.blocks


def test_check_finds_a_table_that_does_not_cover_what_is_computed() -> None:
    cache, a = KVCache(2, 4), make_sequence(range(8))
    compute(cache, a, 4)
    a.num_computed_tokens = 5
    with pytest.raises(AssertionError):
        cache.check([a])
