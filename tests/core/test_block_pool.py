"""Exact examples of the block pool: holders, keys, the order of free blocks; what it refuses."""

from __future__ import annotations

import pytest

from momaserve.core.block_pool import BlockPool
from momaserve.errors import ConfigError


def make_pool(num_blocks: int, keys: str = "") -> BlockPool:
    """A pool with all blocks held; block i has the i-th letter as its key, unless it is "-"."""
    pool = BlockPool(num_blocks)
    assert pool.allocate(num_blocks) == list(range(num_blocks))
    for block, key in enumerate(keys):
        if key != "-":
            pool.set_key(block, key.encode())
    return pool


def test_blocks_are_handed_out_in_the_order_they_were_freed() -> None:
    pool = BlockPool(4)
    assert pool.allocate(3) == [0, 1, 2]
    pool.free([2, 0])
    assert pool.num_free == 3
    assert pool.allocate(3) == [3, 2, 0]
    assert pool.num_free == 0


def test_allocates_all_or_none() -> None:
    pool = make_pool(2, "a")
    pool.free([0])
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert pool.find(b"a") == 0  # nothing was evicted for an answer of no
    assert pool.allocate(0) == []
    assert pool.allocate(1) == [0]
    assert pool.allocate(1) is None


def test_a_block_is_free_when_its_last_holder_leaves() -> None:
    pool = make_pool(1)
    pool.hold(0)
    pool.hold(0)
    assert pool.num_holders(0) == 3
    pool.free([0, 0])
    assert (pool.num_holders(0), pool.num_free) == (1, 0)
    pool.check([[0]])
    pool.free([0])
    assert (pool.num_holders(0), pool.num_free) == (0, 1)
    pool.check([])


def test_a_free_block_keeps_its_key_until_its_room_is_needed() -> None:
    pool = make_pool(2, "a")
    pool.free([0])
    assert (pool.num_free, pool.num_keyed) == (1, 1)
    assert pool.find(b"a") == 0
    pool.hold(0)
    assert (pool.num_free, pool.num_holders(0)) == (0, 1)
    assert pool.find(b"a") == 0
    pool.free([0])
    assert pool.allocate(1) == [0]
    assert pool.find(b"a") is None
    assert pool.num_keyed == 0
    pool.check([[0], [1]])


def test_blocks_without_a_key_go_first_then_the_least_recently_used() -> None:
    pool = make_pool(5, "ab-d-")
    pool.free([3, 0, 4, 1, 2])
    assert pool.allocate(5) == [4, 2, 3, 0, 1]


def test_use_makes_a_block_recent() -> None:
    pool = make_pool(3, "abc")
    pool.free([0, 1, 2])
    pool.hold(0)
    pool.free([0])
    assert pool.allocate(3) == [1, 2, 0]


def test_a_block_with_another_holder_does_not_become_recent() -> None:
    pool = make_pool(2, "ab")
    pool.hold(0)
    pool.free([0, 1, 0])
    assert pool.allocate(2) == [1, 0]


def test_of_two_blocks_with_the_same_contents_the_first_has_the_key() -> None:
    pool = make_pool(2, "a")
    pool.set_key(1, b"a")
    assert pool.find(b"a") == 0
    assert pool.num_keyed == 1
    pool.free([0, 1])
    assert pool.allocate(1) == [1]  # it has no key, and goes first
    pool.check([[1]])


def test_a_key_may_be_given_again_after_its_block_was_evicted() -> None:
    pool = make_pool(2, "a")
    pool.free([0])
    pool.allocate(1)
    pool.set_key(1, b"a")
    assert pool.find(b"a") == 1


def test_forgetting_takes_keys_of_held_and_of_free_blocks() -> None:
    pool = make_pool(4, "abc")
    pool.free([0, 1])
    pool.forget([0, 2, 3])
    assert [pool.find(key) for key in (b"a", b"b", b"c")] == [None, 1, None]
    pool.check([[2, 3]])
    assert pool.allocate(2) == [0, 1]


def test_a_held_block_that_was_forgotten_is_blank_when_it_is_freed() -> None:
    pool = make_pool(2, "ab")
    pool.forget([1])
    pool.free([0, 1])
    assert pool.allocate(2) == [1, 0]


def test_freeing_twice_is_caught() -> None:
    pool = make_pool(2)
    pool.free([0])
    with pytest.raises(AssertionError, match="block 0 is freed twice"):
        pool.free([0])


def test_a_free_block_without_a_key_cannot_be_held() -> None:
    pool = make_pool(1)
    pool.free([0])
    with pytest.raises(KeyError):
        pool.hold(0)


def test_misnaming_is_caught() -> None:
    pool = make_pool(2, "a")
    with pytest.raises(AssertionError, match="block 0 is named twice"):
        pool.set_key(0, b"b")
    pool.free([1])
    with pytest.raises(AssertionError, match="block 1 is named while it is free"):
        pool.set_key(1, b"b")


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_a_pool_without_blocks_is_refused(num_blocks: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1 block, got {num_blocks}"):
        BlockPool(num_blocks)


def test_check_passes_on_a_true_account() -> None:
    pool = make_pool(4, "ab")
    pool.hold(0)
    pool.free([3, 1])
    pool.check([[0], [2, 0]])


@pytest.mark.parametrize(
    "tables",
    [
        pytest.param([[0]], id="a lost block"),
        pytest.param([[0, 1], [1]], id="a holder too many"),
        pytest.param([[0, 1, 1]], id="a block twice in a table"),
        pytest.param([[0, 1, 2]], id="a free block in a table"),
    ],
)
def test_check_finds(tables: list[list[int]]) -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.check(tables)


def test_check_finds_a_key_that_leads_nowhere() -> None:
    pool = make_pool(2, "a")
    pool._keys[0] = None
    with pytest.raises(AssertionError, match="keys and blocks disagree"):
        pool.check([[0, 1]])


def test_check_finds_a_block_in_the_wrong_queue() -> None:
    pool = make_pool(1)
    pool.free([0])
    pool._keyed[pool._blank.pop()] = None
    with pytest.raises(AssertionError):
        pool.check([])


# --- backing -------------------------------------------------------------------------------


def test_backing_is_held_as_long_as_the_block() -> None:
    pool = make_pool(3)
    pool.add_backing(0, [1, 2])
    pool.add_backing(0, [2])  # known already
    assert pool.backing(0) == (1, 2)
    pool.free([1, 2])
    assert pool.num_free == 0
    pool.check([[0]])
    pool.hold(0)
    pool.free([0])
    assert pool.num_free == 0
    pool.free([0])
    assert pool.num_free == 3
    assert pool.backing(0) == ()
    pool.check([])


def test_backing_is_kept_while_the_block_is_remembered() -> None:
    pool = make_pool(4, "ab")
    pool.add_backing(0, [2])
    pool.add_backing(1, [2, 3])
    pool.free([2, 3, 1, 0])
    assert pool.num_free == 4
    pool.check([])
    pool.hold(0)  # and with it 2
    assert pool.num_free == 2
    pool.check([[0]])
    assert pool.allocate(2) == [1, 3]  # 1 is forgotten, so nobody keeps 3 any more
    assert pool.find(b"b") is None
    assert pool.allocate(1) is None
    pool.check([[0], [1, 3]])
    pool.free([0])
    assert pool.num_free == 2
    pool.check([[1, 3]])


def test_room_that_is_only_kept_is_found_by_forgetting_whom_it_is_kept_for() -> None:
    pool = make_pool(5, "ab")
    for block in (0, 1):
        pool.add_backing(block, [2, 3, 4])
    pool.free([2, 3, 4, 1, 0])
    assert pool.num_free == 5
    assert sorted(pool.allocate(5) or ()) == [0, 1, 2, 3, 4]
    pool.check([range(5)])


def test_what_is_forgotten_keeps_nothing() -> None:
    pool = make_pool(3, "ab")
    pool.add_backing(0, [2])
    pool.add_backing(1, [2])
    pool.free([2, 0])
    pool.forget([0])
    pool.check([[1]])
    pool.forget([1])
    assert pool.num_free == 1
    assert pool.backing(1) == (2,)
    pool.check([[1]])
    pool.free([1])
    assert pool.num_free == 3
    pool.check([])


def test_only_held_blocks_have_backing_and_are_backing() -> None:
    pool = make_pool(2)
    pool.free([1])
    with pytest.raises(AssertionError, match="block 1 is free, and backs nothing"):
        pool.add_backing(0, [1])
    with pytest.raises(AssertionError, match="block 1 is backed while it is free"):
        pool.add_backing(1, [0])
