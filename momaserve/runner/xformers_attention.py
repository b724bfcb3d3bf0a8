"""Attention of one step for an operator that reads paged K/V itself; knows no xformers.

A block of tokens holds one page of `block_size` slots per plain layer, so within a layer's view of
the memory (`KVStorage.keys`) the page of block b is page b * pages per block: one table of pages
serves all plain layers, and no K or V is gathered.

The operator takes causal sequences of one number of queries, 16 at most. The new rows of a
sequence are therefore cut into runs of 16, 8, 4, 2 and 1; a run that ends before position e sees
the first e tokens, its own rows causally. All runs of one length are one call, decoding rows among
those of length 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momaserve.core.plan import PlannedSequence, StepPlan
from momaserve.runner.kv_storage import KVLayout, KVStorage
from momaserve.runner.paged_attention import PagedAttention
from momaserve.runner.step_entries import StepEntries
from momaserve.runner.upload import upload

RUN_LENGTHS = (16, 8, 4, 2, 1)
MAX_RUNS = 512
"""Of one call: runs times kv heads are the second dimension of a CUDA grid, at most 65535."""
MIN_BLOCK_SIZE = 16
HEAD_DIMS = (16, 32, 64, 128, 256, 512)
DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class PagedRuns:
    """What one call is told, the same in every plain layer: B runs of `length` rows.

    B and the width of the table are powers of two, since the operator is compiled anew for each.
    The runs that fill up B are copies of the first, with no more keys than they have rows.
    """

    length: int
    num_runs: int
    """Those whose output counts, the first of B."""
    rows: Tensor
    """int64 [B * length] of the step."""
    seq_lens: list[int]
    """Keys of each run, B numbers; the last row sees all, the one before it one less."""
    page_table: Tensor
    """int32 [B, W], pages of a layer's own view; the rest of each row repeats its first page."""
    page_size: int
    """Slots of one page."""


class PagedOperator(Protocol):
    """Attends over pages."""

    def bias(self, runs: PagedRuns) -> Any:
        """What tells the operator of the runs; made once a step."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
        """q [1, B * length, G, H/G, K], k and v [1, slots, G, H/G, K] of which the heads of one
        group are the same memory -> as q."""
        ...


def obstacle_to(head_dim: int, dtype: torch.dtype, block_size: int) -> str | None:
    """Why the operator cannot attend over K/V of these sizes, or None."""
    if dtype not in DTYPES:
        known = " and ".join(map(str, DTYPES))
        return f"its paged attention has no kernels for {dtype}, only for {known}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim {head_dim} is not one of {HEAD_DIMS}, those of its paged attention"
    if block_size < MIN_BLOCK_SIZE:
        return f"block_size {block_size} is less than its smallest page, {MIN_BLOCK_SIZE} tokens"
    return None


@dataclass(frozen=True, slots=True)
class _Run:
    row: int
    """The first of the run's rows in the step."""
    end: int
    """Position behind its last."""
    pages: list[int]
    """Pages of positions 0 to `end`, at least."""


def plan_runs(plan: StepPlan, layout: KVLayout, device: torch.device) -> list[PagedRuns]:
    """The calls of one plain layer; together they have each row of the step once."""
    by_length: dict[int, list[_Run]] = {length: [] for length in RUN_LENGTHS}
    per_block = layout.slots_per_block // layout.block_size
    row = 0
    for planned in plan.sequences:
        stop = planned.start + planned.num_new_tokens
        pages = [block * per_block for block in _blocks_of(planned, layout)]
        position = planned.start
        for length in RUN_LENGTHS:
            while stop - position >= length:
                position += length
                by_length[length].append(_Run(row, position, pages))
                row += length
    return [
        _call(length, runs[first : first + MAX_RUNS], layout.block_size, device)
        for length, runs in by_length.items()
        for first in range(0, len(runs), MAX_RUNS)
    ]


def _blocks_of(planned: PlannedSequence, layout: KVLayout) -> list[int]:
    """Blocks of the sequence up to the last token of the step."""
    stop = planned.start + planned.num_new_tokens
    return list(planned.blocks[: -(-stop // layout.block_size)])


def _call(length: int, runs: list[_Run], page_size: int, device: torch.device) -> PagedRuns:
    num_padding = _power_of_two(len(runs)) - len(runs)
    width = _power_of_two(max(-(-run.end // page_size) for run in runs))
    table = np.empty((len(runs), width), dtype=np.int32)
    for mine, run in zip(table, runs, strict=True):
        count = -(-run.end // page_size)
        mine[:count] = run.pages[:count]
        mine[count:] = run.pages[0]  # of the run itself: nobody else's K/V are ever addressed
    table = np.concatenate((table, np.repeat(table[:1], num_padding, axis=0)))
    first_rows = np.array([run.row for run in runs] + num_padding * [runs[0].row], dtype=np.int64)
    rows = first_rows[:, None] + np.arange(length)
    return PagedRuns(
        length=length,
        num_runs=len(runs),
        rows=upload(rows.reshape(-1), device),
        seq_lens=[run.end for run in runs] + num_padding * [length],
        page_table=upload(table, device),
        page_size=page_size,
    )


def _power_of_two(count: int) -> int:
    """The least that is not less than `count`."""
    return 1 << (count - 1).bit_length()


class XformersAttention:
    """Writes the step's K/V into their slots, then has the operator attend over pages.

    Depth-routed layers keep entries in any order, no pages: they gather them, as plain torch does.
    """

    def __init__(
        self,
        plan: StepPlan,
        storage: KVStorage,
        entries: StepEntries | None,
        operator: PagedOperator,
    ) -> None:
        """
        Args:
            entries: where depth-routed layers keep what they take; None without such layers.
        """
        self._storage = storage
        self._operator = operator
        self._gathering = None if entries is None else PagedAttention(plan, storage, entries)
        device, layout = storage.k.device, storage.layout
        self._slot_mapping = upload(_slot_mapping(plan, layout), device)
        self._calls = [(runs, operator.bias(runs)) for runs in plan_runs(plan, layout, device)]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, taken: Tensor | None) -> Tensor:
        """q [T, H, K], k and v [T, G, K] -> [T, H, K]; see `layers.batch.Attention`."""
        if taken is not None:
            assert self._gathering is not None
            return self._gathering(layer, q, k, v, taken)
        keys, values = self._storage.keys(layer), self._storage.values(layer)
        keys.index_copy_(0, self._slot_mapping, k.to(keys.dtype))
        values.index_copy_(0, self._slot_mapping, v.to(values.dtype))
        grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2])  # [T, G, H/G, K]
        heads = (-1, -1, grouped.shape[2], -1)
        keys, values = keys.unsqueeze(2).expand(heads), values.unsqueeze(2).expand(heads)
        out = torch.empty_like(grouped)
        for runs, bias in self._calls:
            attended = self._operator.attend(
                grouped[runs.rows].unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), bias
            )
            num_rows = runs.num_runs * runs.length
            out[runs.rows[:num_rows]] = attended[0, :num_rows]
        return out.flatten(1, 2)


def _slot_mapping(plan: StepPlan, layout: KVLayout) -> NDArray[np.int64]:
    """[T], the slot of each new token in a plain layer's view."""
    slots: list[NDArray[np.int64]] = []
    for planned in plan.sequences:
        blocks = np.array(_blocks_of(planned, layout), dtype=np.int64)
        positions = np.arange(planned.start, planned.start + planned.num_new_tokens)
        first = blocks[positions // layout.block_size] * layout.slots_per_block
        slots.append(first + positions % layout.block_size)
    return np.concatenate(slots)
