"""Which blocks hold the keys and values of which sequence. Knows no tensor."""

from __future__ import annotations

from collections.abc import Iterable

from momaserve.core.block_key import next_block_key
from momaserve.core.block_pool import BlockPool
from momaserve.request import TokenSequence


class KVCache:
    """Owns the block pool, and the block tables of all sequences.

    A sequence takes blocks as it grows. Full blocks are shared: with whoever has the same
    tokens, policies and salt (`take_hits`), and by the samples of one prompt (`fork`), which
    also share the block that is not full yet until one of them writes to it.

    Today one class of layers stores K/V, and a block is `block_size` tokens of all of them.
    Layers that keep only some tokens (mixture of depths) become further classes, each with a
    table and a length per sequence, which carve the blocks of this same pool.

    Invariants:
      * a sequence's blocks cover its computed tokens;
      * a block that several sequences hold is written by none of them.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        assert block_size >= 1, block_size
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._pool = BlockPool(num_blocks)

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks of no sequence; some of them may hold what the prefix cache remembers."""
        return self._pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that the prefix cache can find, held or free."""
        return self._pool.num_keyed

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, in [0, 1]."""
        return 1.0 - self._pool.num_free / self._pool.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find_hits(self, sequence: TokenSequence) -> list[int]:
        """Cached blocks that hold the sequence's next tokens, in order.

        Always leaves its last token to be computed, since somebody waits for what follows it.
        """
        if sequence.root_key is None or not self.prefix_caching:
            return []
        first = len(sequence.blocks)
        if first * self.block_size != sequence.num_computed_tokens:
            return []  # it writes to a block already: nothing can be put behind it
        hits: list[int] = []
        limit = sequence.num_tokens - 1
        if sequence.max_cached_tokens is not None:
            limit = min(limit, sequence.max_cached_tokens)
        for index in range(first, limit // self.block_size):
            block = self._pool.find(self._key(sequence, index))
            if block is None:
                break
            hits.append(block)
        return hits

    def take_hits(self, sequence: TokenSequence) -> int:
        """Puts all of `find_hits` into the sequence's table; returns how many tokens they hold."""
        hits = self.find_hits(sequence)
        if not hits:
            return 0
        for block in hits:
            self._pool.hold(block)
        sequence.blocks += hits
        sequence.num_committed_blocks = len(sequence.blocks)
        sequence.num_computed_tokens += len(hits) * self.block_size
        return len(hits) * self.block_size

    def take_slot(self, sequence: TokenSequence) -> bool:
        """Computes one more token in the block that is there, if it is the sequence's own."""
        num_computed = sequence.num_computed_tokens
        index = num_computed // self.block_size
        blocks = sequence.blocks
        if index >= len(blocks) or self._pool.num_holders(blocks[index]) != 1:
            return False
        sequence.num_computed_tokens = num_computed = num_computed + 1
        if num_computed % self.block_size == 0:
            self.commit(sequence)
        return True

    def num_new_blocks(self, sequence: TokenSequence, num_tokens: int) -> int:
        """Free blocks that `grow` would take."""
        num_blocks = max(0, self.blocks_for(num_tokens) - len(sequence.blocks))
        return num_blocks + self._shares_its_end(sequence)

    def grow(self, sequence: TokenSequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Makes the blocks cover the first `num_tokens` tokens, and the new ones be its own.

        Returns:
            (from, to) blocks to be copied before anything is written; None when too few blocks
            are free, and then nothing has changed.
        """
        blocks = sequence.blocks
        if num_tokens <= len(blocks) * self.block_size and not self._shares_its_end(sequence):
            return []
        new = self._pool.allocate(self.num_new_blocks(sequence, num_tokens))
        if new is None:
            return None
        copies: list[tuple[int, int]] = []
        if self._shares_its_end(sequence):
            index = sequence.num_computed_tokens // self.block_size
            own = new.pop()
            copies.append((blocks[index], own))
            self._pool.free((blocks[index],))
            blocks[index] = own
        blocks += new
        return copies

    def _shares_its_end(self, sequence: TokenSequence) -> bool:
        """Whether the next token's block is there and held by others too."""
        index = sequence.num_computed_tokens // self.block_size
        blocks = sequence.blocks
        return index < len(blocks) and self._pool.num_holders(blocks[index]) > 1

    def commit(self, sequence: TokenSequence) -> None:
        """Offers the blocks that the sequence has filled, with tokens that are known, to others.

        They may be used from the step that fills them on: every layer writes all K/V of a step
        before it reads any.
        """
        num_known = min(sequence.num_computed_tokens, len(sequence.token_ids))
        num_full = num_known // self.block_size
        num_committed = sequence.num_committed_blocks
        if num_full <= num_committed or sequence.root_key is None or not self.prefix_caching:
            return
        for index in range(num_committed, num_full):
            self._pool.set_key(sequence.blocks[index], self._key(sequence, index))
        sequence.num_committed_blocks = num_full

    def fork(self, source: TokenSequence, target: TokenSequence) -> None:
        """Makes an empty sequence hold the blocks of another with the same tokens."""
        assert not target.blocks and target.num_tokens == source.num_tokens
        target.blocks = source.blocks[: self.blocks_for(source.num_computed_tokens)]
        for block in target.blocks:
            self._pool.hold(block)
        target.block_keys = list(source.block_keys)
        target.num_computed_tokens = source.num_computed_tokens
        target.num_committed_blocks = source.num_committed_blocks

    def release(self, sequence: TokenSequence) -> None:
        """Gives all blocks back, tail first; nothing of the sequence is computed any more."""
        self._pool.free(reversed(sequence.blocks))
        sequence.blocks = []
        sequence.num_computed_tokens = 0
        sequence.num_committed_blocks = 0

    def forget(self, sequence: TokenSequence) -> None:
        """Lets nobody find the sequence's blocks any more: what they hold is broken."""
        self._pool.forget(sequence.blocks)

    def forget_all(self) -> None:
        """Empties the prefix cache; sequences keep their blocks."""
        self._pool.forget(range(self._pool.num_blocks))

    def check(self, sequences: Iterable[TokenSequence]) -> None:
        """Recounts every block from scratch, given all sequences that hold any."""
        held = list(sequences)
        self._pool.check([sequence.blocks for sequence in held])
        for sequence in held:
            assert len(sequence.blocks) * self.block_size >= sequence.num_computed_tokens
            assert sequence.num_committed_blocks <= len(sequence.blocks)

    def _key(self, sequence: TokenSequence, index: int) -> bytes:
        keys = sequence.block_keys
        while len(keys) <= index:
            parent = keys[-1] if keys else sequence.root_key
            assert parent is not None
            keys.append(next_block_key(sequence, parent, self.block_size))
        return keys[index]
