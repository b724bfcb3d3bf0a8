"""Random inputs of kernels: rows, routers, KV memory with poison in all that nobody may read."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from momaserve.kernels import reference
from momaserve.kernels.reference_depth import EntryTables
from momaserve.kernels.reference_routing import GroupRouter, RouterWeights
from momaserve.modality import Modality

TEXT, IMAGE = Modality.TEXT, Modality.IMAGE
GROUPS: dict[str, tuple[tuple[tuple[Modality, ...], int], ...]] = {
    "4t4i": (((TEXT,), 4), ((IMAGE,), 4)),
    "moe-8x": (((TEXT, IMAGE), 8),),
    "1t1i": (((TEXT,), 1), ((IMAGE,), 1)),
    "3t1i": (((TEXT,), 3), ((IMAGE,), 1)),
}
"""Modalities and number of experts of each group."""
_MARGIN = 1e-4
"""Scores this near to their cut may fall on either side of it, and are drawn anew."""
_PLAIN_LAYERS = 2


class Inputs:
    """Draws from one seed: the same numbers on every device, other ones for every name."""

    def __init__(self, seed: int, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        mixed = zlib.crc32(f"{seed} {name}".encode())
        self._generator = torch.Generator().manual_seed(mixed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator)
        return drawn.to(self.device, dtype or self.dtype)

    def integers(
        self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32
    ) -> Tensor:
        """From `low` up to `high`, exclusive."""
        drawn = torch.randint(low, high, shape, generator=self._generator)
        return drawn.to(self.device, dtype)

    def uniform(self, *shape: int) -> Tensor:
        """float64 in [0, 1)."""
        drawn = torch.rand(*shape, generator=self._generator, dtype=torch.float64)
        return drawn.to(self.device)

    def order(self, count: int) -> list[int]:
        """0 to count - 1, shuffled."""
        found: list[int] = torch.randperm(count, generator=self._generator).tolist()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Paged:
    """Sequences in blocks, as `paged_attention` takes them."""

    q: Tensor
    keys: Tensor
    values: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    block_size: int
    block_stride: int
    layer_offset: int
    index: Tensor | None
    max_q: int
    max_len: int


def make_paged(
    inputs: Inputs,
    num_queries: Sequence[int],
    seq_lens: Sequence[int],
    *,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    density: float | None = None,
    padding_rows: int = 0,
) -> Paged:
    """Random sequences in shuffled blocks, the second of two layers.

    Args:
        heads: of queries and of keys.
        density: share of the tokens that a depth-routed layer took; None is a plain layer.
        padding_rows: rows behind those of the sequences.
    """
    num_heads, num_kv_heads = heads
    device = inputs.device
    counts = [-(-length // block_size) for length in seq_lens]
    stride = _PLAIN_LAYERS * block_size
    offset = block_size if density is None else 0
    num_blocks = sum(counts) + 1  # block 0 is nobody's: unused entries of tables point to it
    shape = (num_blocks * stride, num_kv_heads, head_dim)
    keys = torch.full(shape, math.nan, dtype=inputs.dtype, device=device)
    values = keys.clone()
    order = [block + 1 for block in inputs.order(num_blocks - 1)]
    tables = torch.zeros(len(seq_lens), max(counts) + 1, dtype=torch.int32)
    index = None
    if density is not None:
        index = torch.zeros(num_blocks * block_size, dtype=torch.int32, device=device)
    free = torch.tensor(inputs.order((num_blocks - 1) * stride), device=device) + stride
    used = 0
    for number, length in enumerate(seq_lens):
        blocks = [order.pop() for _ in range(counts[number])]
        tables[number, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        positions = torch.arange(length, device=device)
        mine = torch.tensor(blocks, dtype=torch.int64, device=device)[positions // block_size]
        if index is None or density is None:
            slots = mine * stride + offset + positions % block_size
        else:
            taken = inputs.uniform(length) < density
            count = int(taken.sum())
            slots = free[used : used + count]
            used += count
            found = torch.full((length,), -1, dtype=torch.int32, device=device)
            found[taken] = slots.int()
            index[mine * block_size + positions % block_size] = found
        keys[slots] = inputs.normal(len(slots), num_kv_heads, head_dim)
        values[slots] = inputs.normal(len(slots), num_kv_heads, head_dim)
    ends = torch.tensor([0, *num_queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Paged(
        q=inputs.normal(sum(num_queries) + padding_rows, num_heads, head_dim),
        keys=keys,
        values=values,
        block_tables=tables.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        cu_seqlens_q=ends.to(device),
        block_size=block_size,
        block_stride=stride,
        layer_offset=offset,
        index=index,
        max_q=max(num_queries),
        max_len=max(seq_lens),
    )


def make_routers(
    inputs: Inputs, groups: str, width: int, aux: int, stored: torch.dtype
) -> RouterWeights:
    """Routers of one of GROUPS.

    Args:
        stored: number format of the auxiliary routers' first layer.
    """

    def group(modalities: tuple[Modality, ...], size: int) -> GroupRouter:
        if size == 1:
            return GroupRouter(modalities=modalities, num_experts=1, main=None)
        wide = torch.float32
        return GroupRouter(
            modalities=modalities,
            num_experts=size,
            main=inputs.normal(size, width, dtype=wide) / width**0.5,
            fc1=(inputs.normal(aux, width, dtype=wide) / width**0.5).to(stored),
            fc2=inputs.normal(size, aux, dtype=wide) / aux**0.5,
            thresholds=inputs.normal(size, dtype=wide),
        )

    made = [group(modalities, size) for modalities, size in GROUPS[groups]]
    return RouterWeights.stack(made, width, inputs.device)


def clear_rows(inputs: Inputs, count: int, routers: RouterWeights) -> Tensor:
    """Rows [count, D] none of whose scores is so near to its cut that rounding decides."""
    u = inputs.normal(2 * count + 16, routers.main.shape[1])
    main = F.linear(u.double(), routers.main.double())
    near = (main.abs() < _MARGIN) | ((main - routers.thresholds).abs() < _MARGIN)
    for fc1 in routers.fc1:
        near |= reference.router_hidden(u, fc1, routers.fc2).abs() < _MARGIN
    near &= routers.main.any(1)  # experts without router have no scores
    kept = u[~near.any(1)][:count]
    assert len(kept) == count
    return kept.contiguous()


def make_entry_tables(
    inputs: Inputs,
    lengths: Sequence[int],
    starts: Sequence[int],
    num_padding: int,
    *,
    block_size: int,
    block_stride: int,
) -> EntryTables:
    """Sequences with `lengths` rows in a step after `starts` earlier tokens, half of which have
    entries; then padding rows."""
    count, device = len(lengths), inputs.device
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    blocks = max(-(-end // block_size) for end in ends)
    entry_blocks = max(-(-end // block_stride) for end in ends)

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    order = integers(inputs.order(count * (blocks + entry_blocks)))
    sequences = [b for b, length in enumerate(lengths) for _ in range(length)]
    positions = [p for start, end in zip(starts, ends, strict=True) for p in range(start, end)]
    return EntryTables(
        sequences=integers(sequences + [-1] * num_padding),
        positions=integers(positions + [1 << 30] * num_padding),
        cu_seqlens_q=integers([0, *lengths]).cumsum(0, dtype=torch.int32),
        block_tables=order[: count * blocks].view(count, blocks),
        entry_tables=order[count * blocks :].view(count, entry_blocks),
        num_entries=integers([start // 2 for start in starts]),
        index=integers([-99]).repeat(len(order) * block_size),
        block_size=block_size,
        block_stride=block_stride,
    )
