"""Depth routing of one layer in plain torch: what the kernels must match.

Chooses the rows that the layer computes, gives the K/V of each an entry of its sequence, lists
them, and blends what the block made of them into the rows. Letters: T rows, B sequences, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from momaserve.kernels import reference_routing
from momaserve.kernels.reference_routing import RouterWeights
from momaserve.modality import Modality


def depth_routers(
    main: Tensor,
    fc1: Tensor | None,
    fc2: Tensor | None,
    threshold: Tensor | None,
    modalities: tuple[Modality, ...],
) -> RouterWeights:
    """A depth router as one expert that rows of other modalities always take, with weight 1.

    Args:
        main: [1, D]; fc1: [A, D], any float format; fc2: [1, A]; threshold: [1], a logit.
        modalities: those that the layer routes.
    """
    table = [(0, 1, 0 if modality in modalities else -1) for modality in Modality]
    return RouterWeights(
        main=main.float().contiguous(),
        fc1=main.new_zeros(1, 0, main.shape[1]) if fc1 is None else fc1.unsqueeze(0).contiguous(),
        fc2=main.new_zeros(1, 0).float() if fc2 is None else fc2.float().contiguous(),
        thresholds=torch.zeros_like(main[:, 0]).float() if threshold is None else threshold.float(),
        groups=torch.tensor(table, dtype=torch.int32, device=main.device),
        max_group=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryTables:
    """Where the rows of a step stand, and where one layer keeps the K/V of those it takes."""

    sequences: Tensor
    """int32 [T], number of each row's sequence, -1 for padding rows."""
    positions: Tensor
    """int32 [T], of each row in its sequence."""
    cu_seqlens_q: Tensor
    """int32 [B + 1]: rows of sequence b are cu_seqlens_q[b] to cu_seqlens_q[b + 1]."""
    block_tables: Tensor
    """int32 [B, blocks], the blocks of each sequence's tokens."""
    entry_tables: Tensor
    """int32 [B, entry blocks], the blocks that hold its routed entries; the host sees to it that
    there is room for all rows of the step. A row without room would get no entry."""
    num_entries: Tensor
    """int32 [B], entries so far; counted up by each call."""
    index: Tensor
    """int32 [blocks * block_size], the layer's own: slot of each token's K/V, or -1."""
    block_size: int
    """Tokens per block."""
    block_stride: int
    """Entries per block, all of its slots."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenRows:
    """The rows that a layer computes, in their order, in buffers of fixed size."""

    taken: Tensor
    """bool [T]."""
    weight: Tensor
    """float32 [T], of the blend; 1 for rows that are not routed and padding rows."""
    slots: Tensor
    """int32 [T], where the K/V of the row go; -1 where it is skipped."""
    rows: Tensor
    """int32 [T], the taken rows, then -1."""
    places: Tensor
    """int32 [T], place of each row in `rows`, or -1."""
    count: Tensor
    """int32 [1]."""

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> TakenRows:
        def integers(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int32, device=device)

        return cls(
            taken=torch.empty(num_rows, dtype=torch.bool, device=device),
            weight=torch.empty(num_rows, dtype=torch.float32, device=device),
            slots=integers(num_rows),
            rows=integers(num_rows),
            places=integers(num_rows),
            count=integers(1),
        )


def take(
    x: Tensor,
    modality: Tensor,
    policy: Tensor,
    routers: RouterWeights,
    tables: EntryTables,
    *,
    chosen: Tensor | None = None,
    out: TakenRows | None = None,
) -> TakenRows:
    """Chooses the rows of a layer and gives them entries; advances `tables.num_entries`.

    Args:
        x: [T, D], the raw input of the block.
        modality: int8 [T], -1 for padding rows, which are never taken.
        policy: int8 [T], codes of `reference_routing`.
        routers: from `depth_routers`.
        chosen: bool [T, 1], what rows under expert choice were given.
    """
    out = TakenRows.empty(len(x), x.device) if out is None else out
    selected, weights = reference_routing.select(x, modality, policy, routers, chosen=chosen)
    taken = selected.squeeze(1)
    count = int(taken.sum())
    out.taken.copy_(taken)
    out.weight.copy_(torch.where(modality >= 0, weights.squeeze(1), 1.0))
    out.rows.fill_(-1)
    out.rows[:count] = taken.nonzero().squeeze(1).int()
    out.places.fill_(-1)
    out.places[taken] = torch.arange(count, dtype=torch.int32, device=x.device)
    out.count[0] = count
    out.slots.fill_(-1)
    for row, sequence in enumerate(tables.sequences.tolist()):
        if sequence < 0:
            continue
        if taken[row]:
            out.slots[row] = _next_entry(tables, sequence)
        position = int(tables.positions[row])
        block = int(tables.block_tables[sequence, position // tables.block_size])
        place = block * tables.block_size + position % tables.block_size
        tables.index[place] = out.slots[row]
    return out


def _next_entry(tables: EntryTables, sequence: int) -> int:
    number = int(tables.num_entries[sequence])
    tables.num_entries[sequence] += 1
    block, offset = divmod(number, tables.block_stride)
    if block >= tables.entry_tables.shape[1]:
        return -1
    return int(tables.entry_tables[sequence, block]) * tables.block_stride + offset


def gather(x: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x [T, D] at rows int32 [R]: [R, D], zero where a row is -1."""
    found = torch.where((rows >= 0)[:, None], x[rows.long().clamp_min(0)], 0)
    return found if out is None else out.copy_(found)


def blend(
    x: Tensor, block: Tensor, weight: Tensor, places: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """y = x + weight * (block - x) where a row was taken, else x; y = block where weight is 1.

    Args:
        x: [T, D]; block: [R, D], what became of the taken rows, in x's format.
        weight: float32 [T].
        places: int32 [T], which row of `block` is a row's, or -1.
        out: [T, D], possibly x itself.
    """
    y = block[places.long().clamp_min(0)] if len(block) else x
    wide, scale = x.float(), weight.unsqueeze(1)
    mixed = torch.where(scale == 1, y, (wide + scale * (y.float() - wide)).to(x.dtype))
    blended = torch.where((places >= 0)[:, None], mixed, x)
    return blended if out is None else out.copy_(blended)
