"""KV memory of a few sequences with poison in all that nobody may read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from momaserve.kernels import reference
from tests.kernels.triton.device import DEVICE, randn

PLAIN_LAYERS = 2
LAYER = 1
"""Of the plain layers, the one that attention looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paged:
    """Sequences in blocks, and what attention over them must come to."""

    q: Tensor
    keys: Tensor
    values: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    block_size: int
    index: Tensor | None
    wanted: Tensor

    @property
    def block_stride(self) -> int:
        return PLAIN_LAYERS * self.block_size

    @property
    def layer_offset(self) -> int:
        return LAYER * self.block_size if self.index is None else 0


def make_paged(
    num_queries: list[int],
    seq_lens: list[int],
    *,
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    density: float | None = None,
    padding_rows: int = 0,
    seed: int = 0,
) -> Paged:
    """Random sequences in shuffled blocks.

    Args:
        heads: of queries and of keys.
        density: share of the tokens that the layer takes, for a depth-routed layer.
        padding_rows: rows behind those of the sequences.
    """
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // block_size) for length in seq_lens]
    # Block 0 is nobody's; table entries that nobody may read point to it, or in front of it.
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    block_stride = PLAIN_LAYERS * block_size
    num_slots = (sum(counts) + 2) * block_stride
    keys = torch.full((num_slots, num_kv_heads, head_dim), float("nan"))
    values = keys.clone()
    keys[::3], values[1::3] = 1e30, 1e30
    first_slot = block_stride  # so that a block of number -1 is memory, and poisoned
    tables = torch.zeros(len(seq_lens), max(counts, default=0) + 2, dtype=torch.int32)
    tables[:, 1::2] = -1
    index = None
    if density is not None:
        # Where nobody may look, the index points into block 0.
        index = torch.randint(
            0, block_stride, ((sum(counts) + 1) * block_size,), generator=generator
        )
    free = torch.randperm(sum(counts) * block_stride, generator=generator) + block_stride
    used = 0

    rows = sum(num_queries)
    q = randn(rows + padding_rows, num_heads, head_dim, seed=seed + 1, dtype=dtype)
    q[rows:] = float("inf")
    wanted = torch.zeros(q.shape)
    start = 0
    for sequence, (count, length) in enumerate(zip(num_queries, seq_lens, strict=True)):
        blocks = [order.pop() for _ in range(counts[sequence])]
        tables[sequence, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        k = randn(length, num_kv_heads, head_dim, seed=seed + 100 + sequence, dtype=dtype).cpu()
        v = randn(length, num_kv_heads, head_dim, seed=seed + 200 + sequence, dtype=dtype).cpu()
        taken = torch.ones(length, dtype=torch.bool)
        if density is not None:
            taken = torch.rand(length, generator=generator) < density
        for position in range(length):
            block, offset = blocks[position // block_size], position % block_size
            slot = block * block_stride + LAYER * block_size + offset
            if index is not None:
                slot = int(free[used]) if taken[position] else -1
                index[block * block_size + offset] = slot
                used += int(taken[position])
            if slot >= 0:
                keys[first_slot + slot] = k[position].float()
                values[first_slot + slot] = v[position].float()
        mask = torch.arange(length) <= torch.arange(length - count, length).unsqueeze(1)
        mask &= taken
        sees = mask.any(1)
        wanted[start : start + count][sees] = reference.attend(
            q[start : start + count][sees].cpu().float()[None],
            k.float()[None],
            v.float()[None],
            mask[sees],
        )[0]
        start += count
    ends = torch.tensor([0, *num_queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Paged(
        q=q,
        keys=keys.to(DEVICE, dtype)[first_slot:],
        values=values.to(DEVICE, dtype)[first_slot:],
        block_tables=tables.to(DEVICE),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE),
        cu_seqlens_q=ends.to(DEVICE),
        block_size=block_size,
        index=None if index is None else index.to(DEVICE, torch.int32),
        wanted=wanted.to(DEVICE, dtype),
    )
