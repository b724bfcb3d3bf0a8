"""What the depth-routed layers of a step keep, where kernels count it on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from momaserve.core.plan import StepPlan
from momaserve.runner.gpu_buffers import StepBuffers
from momaserve.runner.step_entries import StepEntries


class GpuEntries(StepEntries):
    """`StepEntries` over a step's buffers: kernels append, and nothing here waits for them."""

    def __init__(self, plan: StepPlan, buffers: StepBuffers) -> None:
        """
        Args:
            buffers: filled with the step's inputs, `num_entries` included.
        """
        self._buffers = buffers
        self._names = [(planned.request_id, planned.companion) for planned in plan.sequences]
        self._rows: list[slice] = []
        row = 0
        for planned in plan.sequences:
            self._rows.append(slice(row, row + planned.num_new_tokens))
            row += planned.num_new_tokens
        has_chunk = any(rows.stop - rows.start > 1 for rows in self._rows)
        self._before = buffers.num_entries.long() if has_chunk else None
        self.counts = torch.empty(0)

    def finish(self) -> Tensor:
        """As `StepEntries.finish`."""
        # The buffers are the next step's soon, whose inputs these counts are.
        self.counts = self._buffers.num_entries.long()
        if self._before is not None:
            for sequence, rows in enumerate(self._rows):
                if rows.stop - rows.start > 1:
                    self._order(sequence, rows, self._before[sequence])
        return self._buffers.taken[:, : self._rows[-1].stop].sum(0)

    def _order(self, sequence: int, rows: slice, start: Tensor) -> None:
        """Brings the entries of a chunk into the order of its tokens."""
        buffers = self._buffers
        storage, tables = buffers.storage, buffers.entries[0]
        size, per_block = tables.block_size, tables.block_stride
        positions = buffers.positions[rows].long()
        places = tables.block_tables[sequence].long()[positions // size] * size + positions % size
        by_token = storage.index[:, places].t()  # [n, R]
        is_taken = by_token >= 0
        source = by_token.flatten().long()
        number = start + is_taken.flatten().cumsum(0) - 1
        columns = (number.clamp_min(0) // per_block).clamp_max(tables.entry_tables.shape[1] - 1)
        target = tables.entry_tables[sequence].long()[columns] * per_block + number % per_block
        # How many were taken is the device's secret: the others repeat what the first does. Of
        # none at all, the first copies an entry onto itself.
        does = is_taken.flatten()
        first = does.int().argmax(0, keepdim=True)  # a number would wait for the device
        source = torch.where(does, source, source[first].clamp_min(0))
        moved = torch.where(does, target, torch.where(does[first], target[first], 0))
        storage.k[moved], storage.v[moved] = storage.k[source], storage.v[source]
        kept = torch.where(does, target, -1).view_as(by_token)
        storage.index[:, places] = kept.t().int()

    def by_name(self) -> dict[tuple[str, int], Tensor]:
        """As `StepEntries.by_name`."""
        return {name: self.counts[i : i + 1] for i, name in enumerate(self._names)}
