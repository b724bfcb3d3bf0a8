"""Hands out block numbers. Knows neither requests nor tokens nor the memory behind a block."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from momaserve.errors import ConfigError


class BlockPool:
    """Owns the free blocks among 0 … num_blocks - 1. Each call costs O(1) per block.

    Invariant: a block is either free, and then in the queue once, or held by one owner.
    Blocks are handed out in the order in which they were freed, so whoever frees the tail of a
    sequence before its head sees the tail reused first.

    Raises:
        ConfigError: fewer than one block.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ConfigError(f"the KV cache needs room for at least 1 block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._is_held = bytearray(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Takes that many blocks, or none at all and returns None when fewer are free."""
        assert num_blocks >= 0, num_blocks
        if num_blocks > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(num_blocks)]
        for block in blocks:
            self._is_held[block] = True
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Gives blocks back; the first one given back is the first to be handed out again."""
        for block in blocks:
            assert self._is_held[block], f"block {block} is freed twice"
            self._is_held[block] = False
            self._free.append(block)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Recounts: the free blocks and those of `tables` are every block, each exactly once."""
        held = [block for table in tables for block in table]
        assert all(self._is_held[block] for block in held), "a block of a table is not held"
        assert sum(self._is_held) == len(held), "a held block is in no table, or in two"
        counted = sorted([*held, *self._free])
        assert counted == list(range(self.num_blocks)), "a block is lost or counted twice"
