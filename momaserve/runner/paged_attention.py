"""Attention of one step straight over paged K/V, in plain torch.

The tables that every layer needs are laid out once, when the step's inputs are built. Sequences
with one new token (decode) share one call over a padded table; longer chunks run one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from momaserve.core.plan import StepPlan
from momaserve.kernels import reference
from momaserve.runner.kv_storage import KVStorage


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows [first, first + count) of the step belong to one sequence."""

    first: int
    count: int
    slots: Tensor
    """int64 [S], slots of its tokens so far, the chunk's included."""
    mask: Tensor | None
    """bool [count, S]; None where the chunk is the whole sequence (plain causal)."""


class PagedAttention:
    """Writes the step's K/V into their slots, then attends over each sequence's blocks."""

    def __init__(self, plan: StepPlan, storage: KVStorage) -> None:
        self._storage = storage
        device = storage.k.device
        offsets = torch.arange(storage.block_size)
        slot_mapping: list[Tensor] = []
        decode_rows: list[int] = []
        decode_slots: list[Tensor] = []
        self._chunks: list[_Chunk] = []
        row = 0
        for planned in plan.sequences:
            length = planned.start + planned.num_new_tokens
            blocks = torch.tensor(planned.blocks, dtype=torch.int64)
            slots = (blocks.unsqueeze(1) * storage.block_size + offsets).flatten()[:length]
            slot_mapping.append(slots[planned.start :])
            if planned.num_new_tokens == 1:
                decode_rows.append(row)
                decode_slots.append(slots)
            else:
                mask = None
                if planned.start:
                    ends = torch.arange(planned.start, length).unsqueeze(1)
                    mask = (torch.arange(length).unsqueeze(0) <= ends).to(device)
                self._chunks.append(_Chunk(row, planned.num_new_tokens, slots.to(device), mask))
            row += planned.num_new_tokens
        self._slot_mapping = torch.cat(slot_mapping).to(device)
        self._decode_rows = torch.tensor(decode_rows, dtype=torch.int64, device=device)
        lengths = torch.tensor([len(s) for s in decode_slots], dtype=torch.int64)
        if decode_slots:
            padded = torch.nn.utils.rnn.pad_sequence(decode_slots, batch_first=True)
            width = torch.arange(padded.shape[1])
            # Padded with the row's own first slot: 0 * NaN is NaN, and a request whose K/V are
            # not finite must not reach its mates through the padding.
            padded = torch.where(width < lengths.unsqueeze(1), padded, padded[:, :1])
            self._decode_slots = padded.to(device)  # [B, S]
            self._decode_mask = (width < lengths.unsqueeze(1)).to(device)  # [B, S]
            self._decode_last = (width == lengths.unsqueeze(1) - 1).to(device)  # [B, S]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, taken: Tensor | None) -> Tensor:
        """q [T, H, K], k and v [T, G, K] -> [T, H, K]; see `layers.batch.Attention`."""
        storage = self._storage
        keys, values = storage.k[layer], storage.v[layer]
        keys.index_copy_(0, self._slot_mapping, k.to(keys.dtype))
        values.index_copy_(0, self._slot_mapping, v.to(values.dtype))
        visible: Tensor | None = None
        if taken is not None:
            visible = storage.taken[layer]
            visible.index_copy_(0, self._slot_mapping, taken)
        out = torch.empty_like(q)
        if len(self._decode_rows):
            mask = self._decode_mask
            if visible is not None:
                # A token sees itself even where it is skipped: its row must stay finite.
                mask = (mask & visible[self._decode_slots]) | self._decode_last
            attended = reference.attend(
                q[self._decode_rows].unsqueeze(1),
                keys[self._decode_slots],
                values[self._decode_slots],
                mask[:, None, None, :],
            )
            out[self._decode_rows] = attended.squeeze(1)
        for chunk in self._chunks:
            rows = slice(chunk.first, chunk.first + chunk.count)
            mask_chunk = self._chunk_mask(chunk, visible)
            attended = reference.attend(
                q[rows].unsqueeze(0),
                keys[chunk.slots].unsqueeze(0),
                values[chunk.slots].unsqueeze(0),
                mask_chunk,
                is_causal=mask_chunk is None,
            )
            out[rows] = attended.squeeze(0)
        return out

    @staticmethod
    def _chunk_mask(chunk: _Chunk, visible: Tensor | None) -> Tensor | None:
        if visible is None:
            return chunk.mask
        total = len(chunk.slots)
        start = total - chunk.count
        device = visible.device
        columns = torch.arange(total, device=device).unsqueeze(0)
        rows = torch.arange(start, total, device=device).unsqueeze(1)
        return ((columns <= rows) & visible[chunk.slots]) | (columns == rows)
