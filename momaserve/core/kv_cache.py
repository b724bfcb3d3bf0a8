"""Which blocks hold the keys and values of which request. Knows no tensor and no token id."""

from __future__ import annotations

from collections.abc import KeysView

from momaserve.core.block_pool import BlockPool


class KVCache:
    """Owns the block pool, one block table per admitted request, and the reservations.

    A request reserves its worst case when it is admitted and takes blocks only as it grows into
    them, so a request that runs can always grow to the size it was admitted with.

    Invariants:
      * all reservations together are at most `num_blocks`;
      * no block table is longer than its reservation;
      * a block is in at most one block table.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert block_size >= 1, block_size
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._tables: dict[str, list[int]] = {}
        self._reserved: dict[str, int] = {}
        self._num_reserved = 0

    @property
    def num_blocks(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks in no table; some of them may be reserved."""
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks that are in a block table, in [0, 1]."""
        return 1.0 - self._pool.num_free / self._pool.num_blocks

    @property
    def request_ids(self) -> KeysView[str]:
        """Requests that are admitted and not yet freed."""
        return self._tables.keys()

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def can_admit(self, max_num_tokens: int) -> bool:
        """Whether a request that grows to at most `max_num_tokens` can be admitted now."""
        return self._num_reserved + self.blocks_for(max_num_tokens) <= self.num_blocks

    def admit(self, request_id: str, max_num_tokens: int) -> None:
        """Reserves room for `max_num_tokens`; `can_admit` must have said that there is."""
        assert request_id not in self._tables, f"request {request_id!r} is admitted twice"
        assert self.can_admit(max_num_tokens), f"no room for {max_num_tokens} tokens"
        self._tables[request_id] = []
        self._reserved[request_id] = self.blocks_for(max_num_tokens)
        self._num_reserved += self._reserved[request_id]

    def grow(self, request_id: str, num_tokens: int) -> None:
        """Makes the block table cover the first `num_tokens` tokens; it never shrinks."""
        table = self._tables[request_id]
        num_blocks = self.blocks_for(num_tokens)
        assert num_blocks <= self._reserved[request_id], (
            f"request {request_id!r} grows to {num_blocks} blocks "
            f"but reserved {self._reserved[request_id]}"
        )
        blocks = self._pool.allocate(max(0, num_blocks - len(table)))
        assert blocks is not None, "reservations exceed the pool"
        table += blocks

    def block_ids(self, request_id: str) -> tuple[int, ...]:
        """Blocks of positions 0, 1, …; raises KeyError for a request that is not admitted."""
        return tuple(self._tables[request_id])

    def free(self, request_id: str) -> None:
        """Gives back the blocks, tail first, and the reservation of an admitted request."""
        self._pool.free(reversed(self._tables.pop(request_id)))
        self._num_reserved -= self._reserved.pop(request_id)

    def check(self) -> None:
        """Recounts every block and reservation from scratch."""
        self._pool.check(self._tables.values())
        assert self._reserved.keys() == self._tables.keys()
        assert self._num_reserved == sum(self._reserved.values()) <= self.num_blocks
        for request_id, table in self._tables.items():
            assert len(table) <= self._reserved[request_id], f"{request_id!r} outgrew its room"
