"""Attention of one step over blocks, by the compiled CPU kernels.

Rows of decoding sequences and of short chunks are attended one by one, straight over the blocks;
the keys of a long chunk are laid out once per layer and shared by all its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from momaserve.core.plan import StepPlan
from momaserve.kernels import reference
from momaserve.kernels.cpu import attention
from momaserve.kernels.cpu.linear import Array
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.step_entries import StepEntries

LONG_CHUNK = 16
"""New tokens of one sequence from which laying out its keys pays."""

_ROWS_TOGETHER = 256
"""Rows of a long chunk that are attended in one go; fewer waste less on keys that they do not
see, more keep torch's kernel busy; found by trying."""


_SHARED_PRODUCTS = 400_000
"""Products of queries and keys from which several threads share the rows, as in `cpu_model`; they
come from many places in memory and take longer each."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows [first, first + count) of the step belong to one sequence."""

    first: int
    count: int
    slots: Tensor
    """int64 [S], slots of its tokens so far, the chunk's included."""
    places: Array
    """int64 [S], their places in the index of a depth-routed layer."""
    mask: Tensor
    """bool [count, S], causal."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the rows see that are attended one by one, as `attention.list_slots` lists it."""

    rows: Array
    slots: Array
    counts: Array


class BlockMemory:
    """K/V of all layers as the kernels see them."""

    def __init__(self, storage: KVStorage) -> None:
        self.storage = storage
        self.layout = layout = storage.layout
        every = range(len(layout.plain) + len(layout.routed))
        self.keys = {layer: _as_array(self._view(storage.k, layer)) for layer in every}
        self.values = {layer: _as_array(self._view(storage.v, layer)) for layer in every}
        self.index = {layer: storage.index_of(layer).numpy() for layer in layout.routed}

    def _view(self, memory: Tensor, layer: int) -> Tensor:
        if layer in self.layout.routed:
            return memory
        return memory[self.layout.plain.index(layer) * self.layout.block_size :]


class BlockAttention:
    """Writes the step's K/V into their slots, then attends over each sequence's blocks."""

    def __init__(
        self, plan: StepPlan, memory: BlockMemory, entries: StepEntries | None, num_threads: int
    ) -> None:
        """
        Args:
            entries: where depth-routed layers keep what they take; None without such layers.
        """
        self._memory = memory
        self._num_threads = num_threads
        self._entries = None if entries is None else _Entries.of(entries)
        size, stride = memory.layout.block_size, memory.layout.slots_per_block
        num_blocks = max(len(planned.blocks) for planned in plan.sequences)
        tables = np.zeros((len(plan.sequences), num_blocks), np.int32)
        positions = np.empty(plan.num_tokens, np.int64)
        slots = np.empty(plan.num_tokens, np.int64)
        sequences = np.full(plan.num_tokens, -1)
        self._chunks: list[_Chunk] = []
        row = 0
        for index, planned in enumerate(plan.sequences):
            start, count = planned.start, planned.num_new_tokens
            blocks = tables[index, : len(planned.blocks)]
            blocks[:] = planned.blocks
            if count == 1:
                positions[row] = start
                slots[row] = int(blocks[start // size]) * stride + start % size
                sequences[row] = index
            else:
                tokens = np.arange(start + count)
                block = blocks[tokens // size].astype(np.int64)
                where = block * stride + tokens % size
                positions[row : row + count] = tokens[start:]
                slots[row : row + count] = where[start:]
                if count < LONG_CHUNK:
                    sequences[row : row + count] = index
                else:
                    places = block * size + tokens % size
                    mask = torch.from_numpy(tokens <= tokens[start:, None])
                    self._chunks.append(_Chunk(row, count, torch.from_numpy(where), places, mask))
            row += count
        self._tables, self._positions, self._slots = tables, positions, slots
        self._sequences = sequences
        """int64 [T]: of the rows that are attended one by one; -1 for those of long chunks."""
        self._seen = self._list_seen(sequences, positions, _NONE)

    def attend(self, layer: int, qkv: Array, out: Array) -> None:
        """Stores K/V of all rows and attends.

        Args:
            qkv: float32 [T, (H + 2G) K or more], normed and rotated.
            out: float32 [T, H K].
        """
        memory = self._memory
        keys, values = memory.keys[layer], memory.values[layer]
        attention.store(qkv, out.shape[1], self._slots, keys, values)
        self._attend_rows(qkv, keys, values, self._seen, out)
        storage = memory.storage
        for chunk in self._chunks:
            rows = slice(chunk.first, chunk.first + chunk.count)
            k, v = storage.keys(layer)[chunk.slots], storage.values(layer)[chunk.slots]
            self._attend_chunk(qkv[rows], k, v, chunk.mask, out[rows])

    def take(self, layer: int, taken: Array) -> Array:
        """Notes which rows a depth-routed layer takes, bool [T]; returns their slots, int64 [T]."""
        assert self._entries is not None
        return self._entries.append(self._memory, layer, taken)

    def attend_taken(self, layer: int, rows: Array, slots: Array, qkv: Array, out: Array) -> None:
        """The same as `attend` in a depth-routed layer, for the rows that it took.

        Args:
            rows: int64 [R], which of the step's, ascending.
            slots: int64 [R], where their K/V go.
            qkv: float32 [R, (H + 2G) K or more], normed and rotated.
            out: float32 [R, H K].
        """
        memory = self._memory
        keys, values, index = memory.keys[layer], memory.values[layer], memory.index[layer]
        attention.store(qkv, out.shape[1], slots, keys, values)
        positions = self._positions[rows]
        listed = self._list_seen(self._sequences[rows], positions, index)
        self._attend_rows(qkv, keys, values, listed, out)
        for chunk in self._chunks:
            first, stop = np.searchsorted(rows, (chunk.first, chunk.first + chunk.count))
            if first == stop:
                continue
            found = index[chunk.places]
            seen = (found >= 0).nonzero()[0]  # positions that the layer took
            where = torch.from_numpy(found[seen].astype(np.int64))
            mask = torch.from_numpy(seen <= positions[first:stop, None])
            k, v = memory.storage.k[where], memory.storage.v[where]
            self._attend_chunk(qkv[first:stop], k, v, mask, out[first:stop])

    def _list_seen(self, sequences: Array, positions: Array, index: Array) -> _Seen:
        """What rows see that are attended one by one.

        Args:
            sequences: int64 [R], -1 for the other rows.
            positions: int64 [R].
            index: of a depth-routed layer, or nothing.
        """
        layout = self._memory.layout
        which = (sequences >= 0).nonzero()[0]
        rows = np.stack((which, sequences[which]), axis=1)
        most = int(positions[which].max(initial=-1)) + 1
        slots, counts = np.empty((len(rows), most), np.int32), np.empty(len(rows), np.int64)
        attention.list_slots(
            rows, positions, self._tables, layout.block_size, layout.slots_per_block, index,
            slots, counts,
        )  # fmt: skip
        return _Seen(rows, slots, counts)

    def _attend_rows(self, qkv: Array, keys: Array, values: Array, seen: _Seen, out: Array) -> None:
        num_rows, num_kv_heads = len(seen.rows), keys.shape[1]
        if not num_rows:
            return
        args = qkv, keys, values, seen.rows, seen.slots, seen.counts
        num_products = int(seen.counts.sum()) * out.shape[1]
        if self._num_threads == 1 or num_products < _SHARED_PRODUCTS:
            attention.attend(*args, 1, out)
            return
        # Threads get nearly equal shares of a few rows.
        num_parts = min(num_kv_heads, -(-2 * self._num_threads // num_rows))
        attention.attend_threaded(*args, num_parts, out)

    @staticmethod
    def _attend_chunk(qkv: Array, k: Tensor, v: Tensor, mask: Tensor, out: Array) -> None:
        """qkv [R, (H + 2G) K or more], k and v [S, G, K], mask bool [R, S], out [R, H K].

        Rows see ever more of the keys, from the first on: what none of some rows sees is spared.
        """
        q = torch.from_numpy(qkv[:, : out.shape[1]]).reshape(len(qkv), -1, k.shape[-1])
        k, v = k.float(), v.float()
        for first in range(0, len(qkv), _ROWS_TOGETHER):
            rows = slice(first, min(first + _ROWS_TOGETHER, len(qkv)))
            seen = slice(int(mask[rows.stop - 1].count_nonzero()))
            attended = reference.attend(
                q[None, rows], k[None, seen], v[None, seen], mask[rows, seen]
            )
            torch.from_numpy(out)[rows] = attended.squeeze(0).flatten(1)


@dataclass(frozen=True, slots=True)
class _Entries:
    """`StepEntries` as the kernels see them; shares their memory."""

    sequences: Array
    places: Array
    tables: Array
    counts: Array

    @classmethod
    def of(cls, entries: StepEntries) -> _Entries:
        tensors = (entries.sequences, entries.places, entries.tables, entries.counts)
        return cls(*(tensor.numpy() for tensor in tensors))

    def append(self, memory: BlockMemory, layer: int, taken: Array) -> Array:
        slots = np.empty(len(taken), np.int64)
        per_block = memory.layout.slots_per_block
        attention.append(
            taken, self.sequences, self.tables, per_block, self.places, self.counts,
            memory.index[layer], slots,
        )  # fmt: skip
        return slots


_NONE = np.empty(0, np.int32)


def _as_array(memory: Tensor) -> Array:
    """float32 as it is, bfloat16 as uint16; shares memory."""
    if memory.dtype is torch.float32:
        return memory.numpy()
    return memory.view(torch.int16).numpy().view(np.uint16)
