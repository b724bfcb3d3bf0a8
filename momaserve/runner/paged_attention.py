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
from momaserve.runner.step_entries import StepEntries


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows [first, first + count) of the step belong to one sequence."""

    first: int
    count: int
    start: int
    """Tokens before them."""
    slots: Tensor
    """int64 [S], slots of its tokens so far, the chunk's included."""
    places: Tensor
    """int64 [S], their places in the index of a depth-routed layer."""
    mask: Tensor | None
    """bool [count, S]; None where the chunk is the whole sequence (plain causal)."""


class PagedAttention:
    """Writes the step's K/V into their slots, then attends over each sequence's blocks."""

    def __init__(self, plan: StepPlan, storage: KVStorage, entries: StepEntries | None) -> None:
        """
        Args:
            entries: where depth-routed layers keep what they take; None without such layers.
        """
        self._storage = storage
        self._entries = entries
        device = storage.k.device
        layout = storage.layout
        offsets = torch.arange(layout.block_size)
        slot_mapping: list[Tensor] = []
        decode_rows: list[int] = []
        decode_slots: list[Tensor] = []
        decode_places: list[Tensor] = []
        self._chunks: list[_Chunk] = []
        row = 0
        for planned in plan.sequences:
            length = planned.start + planned.num_new_tokens
            blocks = torch.tensor(planned.blocks, dtype=torch.int64).unsqueeze(1)
            slots = (blocks * layout.slots_per_block + offsets).flatten()[:length]
            places = (blocks * layout.block_size + offsets).flatten()[:length]
            slot_mapping.append(slots[planned.start :])
            if planned.num_new_tokens == 1:
                decode_rows.append(row)
                decode_slots.append(slots)
                decode_places.append(places)
            else:
                mask = None
                if planned.start:
                    ends = torch.arange(planned.start, length).unsqueeze(1)
                    mask = (torch.arange(length).unsqueeze(0) <= ends).to(device)
                self._chunks.append(
                    _Chunk(
                        first=row,
                        count=planned.num_new_tokens,
                        start=planned.start,
                        slots=slots.to(device),
                        places=places.to(device),
                        mask=mask,
                    )
                )
            row += planned.num_new_tokens
        self._slot_mapping = torch.cat(slot_mapping).to(device)
        self._decode_rows = torch.tensor(decode_rows, dtype=torch.int64, device=device)
        if decode_slots:
            lengths = torch.tensor([len(s) for s in decode_slots], dtype=torch.int64)
            is_real = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)

            def padded(tables: list[Tensor]) -> Tensor:
                # With the row's own first slot: 0 * NaN is NaN, and a request whose K/V are not
                # finite must not reach its mates through the padding.
                table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
                return torch.where(is_real, table, table[:, :1]).to(device)

            self._decode_slots = padded(decode_slots)  # [B, S]
            self._decode_places = padded(decode_places)  # [B, S]
            self._decode_mask = is_real.to(device)  # [B, S]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, taken: Tensor | None) -> Tensor:
        """q [T, H, K], k and v [T, G, K] -> [T, H, K]; see `layers.batch.Attention`."""
        if taken is not None:
            return self._attend_taken(layer, q, k, v, taken)
        storage = self._storage
        keys, values = storage.keys(layer), storage.values(layer)
        keys.index_copy_(0, self._slot_mapping, k.to(keys.dtype))
        values.index_copy_(0, self._slot_mapping, v.to(values.dtype))
        out = torch.empty_like(q)
        if len(self._decode_rows):
            attended = reference.attend(
                q[self._decode_rows].unsqueeze(1),
                keys[self._decode_slots],
                values[self._decode_slots],
                self._decode_mask[:, None, None, :],
            )
            out[self._decode_rows] = attended.squeeze(1)
        for chunk in self._chunks:
            rows = slice(chunk.first, chunk.first + chunk.count)
            attended = reference.attend(
                q[rows].unsqueeze(0),
                keys[chunk.slots].unsqueeze(0),
                values[chunk.slots].unsqueeze(0),
                chunk.mask,
                is_causal=chunk.mask is None,
            )
            out[rows] = attended.squeeze(0)
        return out

    def _attend_taken(self, layer: int, q: Tensor, k: Tensor, v: Tensor, taken: Tensor) -> Tensor:
        """A depth-routed layer: the taken rows alone, over what it took of their sequences."""
        assert self._entries is not None
        storage = self._storage
        slots = self._entries.append(layer, taken)
        mine = taken.nonzero().squeeze(1)
        storage.k.index_copy_(0, slots[mine], k[mine].to(storage.k.dtype))
        storage.v.index_copy_(0, slots[mine], v[mine].to(storage.v.dtype))
        index = storage.index_of(layer)
        out = torch.zeros_like(q)
        if len(self._decode_rows):
            which = taken[self._decode_rows].nonzero().squeeze(1)
            rows = self._decode_rows[which]
            found = index[self._decode_places[which]].long()
            mask = self._decode_mask[which] & (found >= 0)
            found = torch.where(mask, found, slots[rows].unsqueeze(1))
            attended = reference.attend(
                q[rows].unsqueeze(1), storage.k[found], storage.v[found], mask[:, None, None, :]
            )
            out[rows] = attended.squeeze(1)
        for chunk in self._chunks:
            found = index[chunk.places].long()
            seen = (found >= 0).nonzero().squeeze(1)  # positions that the layer took
            new = seen[seen >= chunk.start]
            rows = chunk.first - chunk.start + new
            attended = reference.attend(
                q[rows].unsqueeze(0),
                storage.k[found[seen]].unsqueeze(0),
                storage.v[found[seen]].unsqueeze(0),
                seen.unsqueeze(0) <= new.unsqueeze(1),
            )
            out[rows] = attended.squeeze(0)
        return out
