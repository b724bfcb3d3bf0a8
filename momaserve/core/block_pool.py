"""Hands out block numbers and remembers what full ones hold. Knows neither requests nor tokens."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Iterable, Sequence

from momaserve.errors import ConfigError


class BlockPool:
    """Owns the blocks 0 … num_blocks - 1. Each call costs O(1) per block.

    A block is held by one sequence or, where they agree, by several. A full block may have a
    key; it keeps key and contents when its last holder leaves, until its room is needed, and
    whoever asks for the key in the meantime holds it again.

    Some contents of a block may lie in other blocks, its backing: held while it is held, kept
    while it is free and remembered. Many blocks may have the same backing.

    Invariants:
      * a block has holders, is kept, or is in exactly one of the two queues of free blocks;
      * a key leads to one block, and that block's key is this one;
      * free blocks without a key are handed out first, then those with one, least recently
        used first.

    Raises:
        ConfigError: fewer than one block.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ConfigError(f"the KV cache needs room for at least 1 block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._num_holders = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._blocks: dict[bytes, int] = {}
        self._blank: deque[int] = deque(range(num_blocks))
        # Ordered dict: O(1) at the head and for a block in the middle that is wanted again.
        self._keyed: OrderedDict[int, None] = OrderedDict()
        self._backing: dict[int, tuple[int, ...]] = {}
        self._num_keepers: dict[int, int] = {}
        """Free blocks with a key that a block is backing of; only of blocks that have some."""
        self._num_kept_only = 0
        """Blocks with keepers and no holder."""

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those that are remembered included."""
        return len(self._blank) + len(self._keyed) + self._num_kept_only

    @property
    def num_keyed(self) -> int:
        """Blocks with a key, held or free."""
        return len(self._blocks)

    def num_holders(self, block: int) -> int:
        return self._num_holders[block]

    def find(self, key: bytes) -> int | None:
        """The block with this key, which the caller may `hold`."""
        return self._blocks.get(key)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Takes that many blocks, or none at all and returns None when fewer are free."""
        assert num_blocks >= 0, num_blocks
        if num_blocks > self.num_free:
            return None
        blocks: list[int] = []
        while len(blocks) < num_blocks:
            if self._blank:
                block = self._blank.popleft()
            else:
                block, _ = self._keyed.popitem(last=False)
                self._drop_key(block)
                self._drop_backing(block)
            self._num_holders[block] = 1
            blocks.append(block)
        return blocks

    def hold(self, block: int) -> None:
        """Adds a holder to a block that has holders, or that is free and has a key."""
        if not self._num_holders[block]:
            del self._keyed[block]  # raises KeyError for a free block that holds nothing
            for other in self._backing.get(block, ()):
                self._num_kept_only -= not self._num_holders[other]
                self._num_holders[other] += 1
                self._remove_keeper(other)
        self._num_holders[block] += 1

    def backing(self, block: int) -> tuple[int, ...]:
        """Blocks in which the rest of a block's contents lies."""
        return self._backing.get(block, ())

    def add_backing(self, block: int, others: Collection[int]) -> None:
        """Says that contents of a held block lie in these blocks, which are held too."""
        assert self._num_holders[block] > 0, f"block {block} is backed while it is free"
        known = self._backing.get(block, ())
        new = tuple(other for other in others if other not in known)
        for other in new:
            assert self._num_holders[other] > 0, f"block {other} is free, and backs nothing"
            self._num_holders[other] += 1
        if new:
            self._backing[block] = known + new

    def free(self, blocks: Iterable[int]) -> None:
        """Takes one holder from each block. Give the tail of a sequence first: of its blocks,
        those are then evicted first, and a shorter prefix remains."""
        for block in blocks:
            num_holders = self._num_holders[block]
            assert num_holders > 0, f"block {block} is freed twice"
            self._num_holders[block] = num_holders - 1
            if num_holders > 1:
                continue
            if self._keys[block] is not None:
                self._keyed[block] = None
                if block in self._backing:
                    self._keep(self._backing[block])
            elif block in self._num_keepers:
                self._num_kept_only += 1
            else:
                self._blank.append(block)
                if block in self._backing:
                    self.free(self._backing.pop(block))

    def set_key(self, block: int, key: bytes) -> None:
        """Names the contents of a held block. A key that another block has stays with that."""
        assert self._num_holders[block] > 0, f"block {block} is named while it is free"
        assert self._keys[block] is None, f"block {block} is named twice"
        if key not in self._blocks:
            self._blocks[key] = block
            self._keys[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """Takes the keys of these blocks away: their contents are not to be trusted."""
        for block in blocks:
            if self._keys[block] is None:
                continue
            self._drop_key(block)
            if not self._num_holders[block]:
                del self._keyed[block]
                self._blank.append(block)
                self._drop_backing(block)

    def _keep(self, others: Iterable[int]) -> None:
        """The block that these back is free now, and remembered."""
        for other in others:
            self._num_keepers[other] = self._num_keepers.get(other, 0) + 1
        self.free(others)

    def _drop_backing(self, block: int) -> None:
        """Forgets where the rest of a free block's contents was."""
        for other in self._backing.pop(block, ()):
            self._remove_keeper(other)
            if not self._num_holders[other] and other not in self._num_keepers:
                self._num_kept_only -= 1
                self._blank.append(other)

    def _remove_keeper(self, block: int) -> None:
        if self._num_keepers[block] > 1:
            self._num_keepers[block] -= 1
        else:
            del self._num_keepers[block]

    def _drop_key(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        del self._blocks[key]
        self._keys[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Recounts holders, keepers, queues and keys from the block tables of all sequences."""
        counted = Counter(block for table in tables for block in table)
        held = [block for block in self._backing if counted[block]]
        kept = Counter(
            other
            for block, others in self._backing.items()
            if not counted[block]
            for other in others
        )
        for block in held:
            counted.update(self._backing[block])
        holders = [counted[block] for block in range(self.num_blocks)]
        assert holders == self._num_holders, "holders are miscounted"
        assert kept == self._num_keepers, "keepers are miscounted"
        kept_only = [block for block in kept if not counted[block]]
        assert len(kept_only) == self._num_kept_only
        free = sorted([*self._blank, *self._keyed, *kept_only])
        assert free == [b for b, n in enumerate(holders) if not n], "a block is lost or free twice"
        assert all(self._keys[block] is None for block in (*self._blank, *kept))
        assert all(self._keys[block] is not None for block in self._keyed)
        assert self._backing.keys().isdisjoint(self._blank)
        named = {key: block for block, key in enumerate(self._keys) if key is not None}
        assert named == self._blocks, "keys and blocks disagree"
