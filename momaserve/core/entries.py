"""Which blocks hold what depth-routed layers kept of a sequence. Knows no tensor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from momaserve.core.block_pool import BlockPool
from momaserve.request import TokenSequence


@dataclass(frozen=True, slots=True)
class EntryShape:
    """An entry is K and V of one token in one depth-routed layer that took it."""

    per_token: int
    """Most entries of a token: the number of depth-routed layers."""
    per_block: int
    """Entries that a block has room for."""

    def blocks_for(self, num_entries: int) -> int:
        return -(-num_entries // self.per_block)


@dataclass(slots=True, eq=False)
class _Writing:
    """Tokens of one sequence in a step that is not settled."""

    sequence: TokenSequence
    num_tokens: int
    first_end: int
    """How many of them lie in the first of `blocks`; the next ones lie `block_size` each."""
    blocks: list[int]
    """The blocks that hold these tokens' K/V of the plain layers; empty when nobody is to know
    any more where their entries are."""


class EntryTables:
    """Gives each sequence blocks for its entries, beside those of the plain layers.

    A sequence's entries follow each other, first by token, then by layer: entry n is in block
    `entry_blocks[n // per_block]`. How many a token has is known only when its step has run.
    Until then there is room for the most, and `settle` gives back what was not needed.

    Entries are written once and belong to the block of their token, whoever holds that: they
    are its backing (`BlockPool.add_backing`). So a prefix of blocks brings its entries along,
    and a sequence that has another's blocks begins a table of its own. Where entries lie within
    their blocks is the runner's business.
    """

    def __init__(self, shape: EntryShape, block_size: int, pool: BlockPool) -> None:
        self.shape = shape
        self._block_size = block_size
        self._pool = pool
        self._unsettled: deque[_Writing] = deque()

    def num_new_blocks(self, sequence: TokenSequence, num_tokens: int) -> int:
        """Free blocks needed for the entries of its first `num_tokens` tokens, at the most."""
        needed = self.shape.blocks_for(self._most(sequence, num_tokens))
        return max(0, needed - len(sequence.entry_blocks))

    def has_room(self, sequence: TokenSequence) -> bool:
        """Whether the entries of one more token have room, however many they are."""
        room = len(sequence.entry_blocks) * self.shape.per_block
        return sequence.max_num_entries + self.shape.per_token <= room

    def _most(self, sequence: TokenSequence, num_tokens: int) -> int:
        new = max(0, num_tokens - sequence.num_computed_tokens)
        return sequence.max_num_entries + new * self.shape.per_token

    def take(self, sequence: TokenSequence, start: int, num_tokens: int) -> None:
        """Notes that a step writes the entries of these tokens; there is room for them."""
        size = self._block_size
        first, last = start // size, (start + num_tokens - 1) // size
        sequence.max_num_entries += num_tokens * self.shape.per_token
        self._unsettled.append(
            _Writing(
                sequence,
                num_tokens,
                min(num_tokens, (first + 1) * size - start),
                sequence.blocks[first : last + 1],
            )
        )

    def settle(self, counts: Iterable[Sequence[int]]) -> None:
        """Takes what the oldest step wrote.

        Args:
            counts: for each `take` of that step, in order, the number of entries of each token.
        """
        for taken in counts:
            writing = self._unsettled.popleft()
            if writing.blocks:
                self._settle(writing, taken)

    def _settle(self, writing: _Writing, counts: Sequence[int]) -> None:
        sequence, shape = writing.sequence, self.shape
        assert len(counts) == writing.num_tokens, (len(counts), writing.num_tokens)
        first = sequence.num_entries
        start, stop = 0, writing.first_end
        for block in writing.blocks:
            count = sum(counts[start:stop])
            if count and block >= 0:
                last = (first + count - 1) // shape.per_block
                self._pool.add_backing(
                    block, sequence.entry_blocks[first // shape.per_block : last + 1]
                )
            first += count
            start, stop = stop, stop + self._block_size
        sequence.max_num_entries -= writing.num_tokens * shape.per_token
        sequence.max_num_entries += first - sequence.num_entries
        sequence.num_entries = first
        kept = max(sequence.num_reserved_tokens, sequence.num_computed_tokens)
        needed = shape.blocks_for(self._most(sequence, kept))
        if needed < len(sequence.entry_blocks):
            self._pool.free(sequence.entry_blocks[needed:])
            del sequence.entry_blocks[needed:]

    def give_up(self, count: int) -> None:
        """Forgets the oldest `count` writings: nobody can tell what the step wrote."""
        for _ in range(count):
            self._unsettled.popleft()

    def copy(self, sequence: TokenSequence, source: int, target: int) -> None:
        """The sequence's block `target` becomes a copy of `source`, entries of it included."""
        self._pool.add_backing(target, self._pool.backing(source))
        for writing in self._unsettled:
            if source not in writing.blocks:
                continue
            possible = self._possible(writing.sequence)
            self._pool.add_backing(target, possible)
            if writing.sequence is sequence:  # `source` is others' alone from now on
                self._pool.add_backing(source, possible)
                writing.blocks[writing.blocks.index(source)] = -1

    def release(self, sequence: TokenSequence) -> None:
        """Gives its table back, before it lets go of its other blocks.

        Who shares a block that a step is still filling keeps all that its entries may lie in.
        """
        if sequence.max_num_entries > sequence.num_entries:
            possible = self._possible(sequence)
            for writing in self._unsettled:
                if writing.sequence is sequence:
                    for block in writing.blocks:
                        if block >= 0:
                            self._pool.add_backing(block, possible)
                    writing.blocks = []
        self._pool.free(reversed(sequence.entry_blocks))
        sequence.entry_blocks = []
        sequence.num_entries = sequence.max_num_entries = sequence.num_reserved_tokens = 0

    def _possible(self, sequence: TokenSequence) -> list[int]:
        """Blocks in which entries of steps in flight may lie."""
        first = sequence.num_entries // self.shape.per_block
        return sequence.entry_blocks[first : self.shape.blocks_for(sequence.max_num_entries)]

    def check(self, sequences: Iterable[TokenSequence]) -> None:
        """Recounts bounds from the steps in flight."""
        for sequence in sequences:
            pending = sum(w.num_tokens for w in self._unsettled if w.sequence is sequence)
            bound = sequence.num_entries + pending * self.shape.per_token
            assert sequence.max_num_entries == bound, "entries are miscounted"
            assert bound <= len(sequence.entry_blocks) * self.shape.per_block
