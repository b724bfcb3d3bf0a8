"""Which blocks hold the keys and values of which sequence. Knows no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from momaserve.core.block_key import next_block_key
from momaserve.core.block_pool import BlockPool
from momaserve.core.entries import EntryShape, EntryTables
from momaserve.request import TokenSequence


class KVCache:
    """Owns the block pool, and the block tables of all sequences.

    A sequence takes blocks as it grows. Full blocks are shared: with whoever has the same
    tokens, policies and salt (`take_hits`), and by the samples of one prompt (`fork`), which
    also share the block that is not full yet until one of them writes to it.

    A block is `block_size` tokens of all layers that keep every token. What depth-routed layers
    keep goes, entry by entry, into further blocks of the same pool (`core.entries`).

    Invariants:
      * a sequence's blocks cover its computed tokens;
      * a block that several sequences hold is written by none of them.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        entries: EntryShape | None = None,
    ) -> None:
        """
        Args:
            entries: what depth-routed layers keep; None where there are none.
        """
        assert block_size >= 1, block_size
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._pool = BlockPool(num_blocks)
        self._entries = None if entries is None else EntryTables(entries, block_size, self._pool)

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
        """Number of blocks that hold `num_tokens` tokens, should every layer keep all of them."""
        num_blocks = self._table_len(num_tokens)
        if self._entries is not None:
            shape = self._entries.shape
            num_blocks += shape.blocks_for(num_tokens * shape.per_token)
        return num_blocks

    def tokens_in(self, num_blocks: int) -> int:
        """Most tokens of one sequence that so many blocks hold for sure."""
        per_token = 1 / self.block_size
        if self._entries is not None:
            per_token += self._entries.shape.per_token / self._entries.shape.per_block
        num_tokens = int(num_blocks / per_token)
        while self.blocks_for(num_tokens) > num_blocks:
            num_tokens -= 1
        while self.blocks_for(num_tokens + 1) <= num_blocks:
            num_tokens += 1
        return num_tokens

    def _table_len(self, num_tokens: int) -> int:
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
        if self._entries is not None:
            if not self._entries.has_room(sequence):
                return False
            self._entries.take(sequence, num_computed, 1)
        sequence.num_computed_tokens = num_computed = num_computed + 1
        if num_computed % self.block_size == 0:
            self.commit(sequence)
        return True

    def num_new_blocks(self, sequence: TokenSequence, num_tokens: int) -> int:
        """Free blocks that `grow` would take."""
        num_blocks = max(0, self._table_len(num_tokens) - len(sequence.blocks))
        if self._entries is not None:
            num_blocks += self._entries.num_new_blocks(sequence, num_tokens)
        return num_blocks + self._shares_its_end(sequence)

    def grow(self, sequence: TokenSequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Makes the blocks cover the first `num_tokens` tokens, and the new ones be its own.

        Returns:
            (from, to) blocks to be copied before anything is written; None when too few blocks
            are free, and then nothing has changed.
        """
        num_new = self.num_new_blocks(sequence, num_tokens)
        if not num_new:
            return []
        new = self._pool.allocate(num_new)
        if new is None:
            return None
        blocks = sequence.blocks
        copies: list[tuple[int, int]] = []
        if self._shares_its_end(sequence):
            index = sequence.num_computed_tokens // self.block_size
            own = new.pop()
            copies.append((blocks[index], own))
            if self._entries is not None:
                self._entries.copy(sequence, blocks[index], own)
            self._pool.free((blocks[index],))
            blocks[index] = own
        num_plain = max(0, self._table_len(num_tokens) - len(blocks))
        blocks += new[:num_plain]
        sequence.entry_blocks += new[num_plain:]
        return copies

    def reserve(self, sequence: TokenSequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """As `grow`, but for as long as the sequence runs."""
        copies = self.grow(sequence, num_tokens)
        if copies is not None:
            sequence.num_reserved_tokens = num_tokens
        return copies

    def advance(self, sequence: TokenSequence, num_tokens: int) -> None:
        """Computes so many more tokens in the blocks that are there."""
        if self._entries is not None:
            self._entries.take(sequence, sequence.num_computed_tokens, num_tokens)
        sequence.num_computed_tokens += num_tokens
        self.commit(sequence)

    def settle(self, num_sequences: int, entry_counts: Sequence[Sequence[int]] | None) -> None:
        """Takes what the oldest step in flight kept in depth-routed layers.

        Args:
            num_sequences: sequences that were advanced in that step.
            entry_counts: for each of them, how many such layers took each of its tokens; None
                when the step failed, and no request of it goes on.
        """
        if self._entries is None:
            return
        if entry_counts is None:
            self._entries.give_up(num_sequences)
        else:
            assert len(entry_counts) == num_sequences, (len(entry_counts), num_sequences)
            self._entries.settle(entry_counts)

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
        target.blocks = source.blocks[: self._table_len(source.num_computed_tokens)]
        for block in target.blocks:
            self._pool.hold(block)
        target.block_keys = list(source.block_keys)
        target.num_computed_tokens = source.num_computed_tokens
        target.num_committed_blocks = source.num_committed_blocks

    def release(self, sequence: TokenSequence) -> None:
        """Gives all blocks back, tail first; nothing of the sequence is computed any more."""
        if self._entries is not None:
            self._entries.release(sequence)
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
        tables = [sequence.blocks for sequence in held]
        if self._entries is not None:
            self._entries.check(held)
            tables += [sequence.entry_blocks for sequence in held]
        self._pool.check(tables)
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
