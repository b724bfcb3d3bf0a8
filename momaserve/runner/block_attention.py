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

LONG_CHUNK = 16
"""New tokens of one sequence from which laying out its keys pays."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows [first, first + count) of the step belong to one sequence."""

    first: int
    count: int
    slots: Tensor
    """int64 [S], slots of its tokens so far, the chunk's included."""
    mask: Tensor
    """bool [count, S], causal."""


class BlockMemory:
    """K/V of all layers as the kernels see them."""

    def __init__(self, storage: KVStorage) -> None:
        self.storage = storage
        self.block_size = storage.block_size
        self.keys, self.values = _as_array(storage.k), _as_array(storage.v)
        self.taken = {layer: flags.numpy() for layer, flags in storage.taken.items()}


class BlockAttention:
    """Writes the step's K/V into their slots, then attends over each sequence's blocks."""

    def __init__(self, plan: StepPlan, memory: BlockMemory, threads: bool) -> None:
        self._memory = memory
        self._threads = threads
        size = memory.block_size
        num_blocks = max(len(planned.blocks) for planned in plan.sequences)
        tables = np.zeros((len(plan.sequences), num_blocks), np.int32)
        positions = np.empty(plan.num_tokens, np.int64)
        slots = np.empty(plan.num_tokens, np.int64)
        rows: list[tuple[int, int]] = []
        self._chunks: list[_Chunk] = []
        row = 0
        for index, planned in enumerate(plan.sequences):
            count, length = planned.num_new_tokens, planned.start + planned.num_new_tokens
            blocks = tables[index, : len(planned.blocks)]
            blocks[:] = planned.blocks
            if count == 1:
                positions[row] = planned.start
                slots[row] = blocks[planned.start // size] * size + planned.start % size
                rows.append((row, index))
            else:
                places = np.arange(length)
                where = blocks[places // size].astype(np.int64) * size + places % size
                positions[row : row + count] = places[planned.start :]
                slots[row : row + count] = where[planned.start :]
                if count < LONG_CHUNK:
                    rows += ((row + i, index) for i in range(count))
                else:
                    mask = places <= places[planned.start :, None]
                    self._chunks.append(
                        _Chunk(row, count, torch.from_numpy(where), torch.from_numpy(mask))
                    )
            row += count
        self._tables, self._positions, self._slots = tables, positions, slots
        self._rows = np.array(rows, np.int64).reshape(-1, 2)

    def attend(self, layer: int, qkv: Array, taken: Array | None, out: Array) -> None:
        """Stores K/V of the rows and attends.

        Args:
            qkv: float32 [T, (H + 2G) K or more], normed and rotated.
            taken: bool [T]; None means all. Rows of other tokens are neither stored nor attended.
            out: float32 [T, H K], written at the taken rows.
        """
        memory = self._memory
        keys, values = memory.keys[layer], memory.values[layer]
        width = out.shape[1]
        visible, rows = _NONE, self._rows
        if taken is None:
            attention.store(qkv, width, self._slots, keys, values)
        else:
            visible = memory.taken[layer]
            visible[self._slots] = taken
            mine = taken.nonzero()[0]
            attention.store(qkv[mine], width, self._slots[mine], keys, values)
            rows = rows[taken[rows[:, 0]]]
        if len(rows):
            attend = attention.attend_threaded if self._threads else attention.attend
            attend(
                qkv, keys, values, rows, self._positions, self._tables, memory.block_size,
                visible, out,
            )  # fmt: skip
        for chunk in self._chunks:
            self._attend_chunk(layer, chunk, qkv, taken is not None, out)

    def _attend_chunk(
        self, layer: int, chunk: _Chunk, qkv: Array, is_routed: bool, out: Array
    ) -> None:
        storage = self._memory.storage
        num_kv_heads, head_dim = storage.k.shape[2:]
        rows = slice(chunk.first, chunk.first + chunk.count)
        width = out.shape[1]
        q = torch.from_numpy(qkv[rows, :width]).reshape(chunk.count, -1, head_dim)
        mask = chunk.mask
        if is_routed:
            # A token sees itself even where it is skipped: its row must stay finite.
            own = torch.from_numpy(self._positions[rows, None]) == torch.arange(len(chunk.slots))
            mask = (mask & storage.taken[layer][chunk.slots]) | own
        attended = reference.attend(
            q.unsqueeze(0),
            storage.k[layer][chunk.slots].float().unsqueeze(0),
            storage.v[layer][chunk.slots].float().unsqueeze(0),
            mask,
        )
        torch.from_numpy(out[rows])[:] = attended.squeeze(0).flatten(1)


_NONE = np.empty(0, np.bool_)


def _as_array(memory: Tensor) -> Array:
    """float32 as it is, bfloat16 as uint16; shares memory."""
    if memory.dtype is torch.float32:
        return memory.numpy()
    return memory.view(torch.int16).numpy().view(np.uint16)
