"""What the depth-routed layers of one step keep: where it goes, and how much it was."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from momaserve.core.plan import StepPlan
from momaserve.runner.kv_storage import KVStorage


class StepEntries:
    """Appends the tokens that each layer takes to their sequences' entries, on the device.

    Nobody but the device knows how many a sequence has while a step is in flight, so its counts
    stay there and go from one step to the next. Rows are the step's tokens, in the plan's order.
    """

    def __init__(
        self, plan: StepPlan, storage: KVStorage, before: Mapping[tuple[str, int], Tensor]
    ) -> None:
        """
        Args:
            before: for each (request, companion) of the step in flight, int64 [1]: the entries
                that it has then.
        """
        self._storage = storage
        layout, device = storage.layout, storage.k.device
        size = layout.block_size
        offsets = torch.arange(size)
        sequences: list[Tensor] = []
        places: list[Tensor] = []
        tables: list[Tensor] = []
        starts = torch.tensor([planned.num_entries for planned in plan.sequences], device=device)
        first_rows: list[int] = []
        self._chunks: list[tuple[int, slice]] = []
        row = 0
        for index, planned in enumerate(plan.sequences):
            count = planned.num_new_tokens
            bound = planned.max_num_entries - count * len(layout.routed)
            if bound > planned.num_entries:  # some are in flight
                starts[index] = before[planned.request_id, planned.companion][0]
            sequences.append(torch.full((count,), index))
            first, last = planned.start // size, (planned.start + count - 1) // size
            blocks = torch.tensor(planned.blocks[first : last + 1])
            start = planned.start - first * size
            every = (blocks.unsqueeze(1) * size + offsets).flatten()
            places.append(every[start : start + count])
            tables.append(torch.tensor(planned.entry_blocks, dtype=torch.int64))
            first_rows.append(row)
            if count > 1:
                self._chunks.append((index, slice(row, row + count)))
            row += count
        self.sequences = torch.cat(sequences).to(device)
        """int64 [T], the sequence of each row."""
        self.places = torch.cat(places).to(device)
        """int64 [T], where `KVStorage.index` tells of each row's token."""
        self.tables = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(device)
        """int64 [B, blocks], of entries."""
        self.counts = starts.clone()
        """int64 [B], entries of each sequence."""
        self._starts = starts
        self._first_rows = torch.tensor(first_rows, device=device)
        self._names = [(planned.request_id, planned.companion) for planned in plan.sequences]

    def append(self, layer: int, taken: Tensor) -> Tensor:
        """Gives the taken rows, bool [T], their slots.

        Returns:
            int64 [T]; -1 for the rows that the layer skips.
        """
        order = taken.cumsum(0)
        before = order[self._first_rows] - taken[self._first_rows].long()
        number = self.counts[self.sequences] + order - before[self.sequences] - 1
        slots = torch.where(taken, self._slots(self.sequences, number.clamp_min(0)), -1)
        self.counts.index_add_(0, self.sequences, taken.long())
        self._storage.index_of(layer)[self.places] = slots.int()
        return slots

    def _slots(self, sequences: Tensor, numbers: Tensor) -> Tensor:
        per_block = self._storage.layout.slots_per_block
        # A row that is skipped may point behind its table; what it finds is not used.
        columns = (numbers // per_block).clamp_max(self.tables.shape[1] - 1)
        return self.tables[sequences, columns] * per_block + numbers % per_block

    def finish(self) -> Tensor:
        """Brings the entries of each sequence into the order of its tokens.

        A chunk's were written layer by layer. The blocks that hold a prefix of its tokens are to
        hold no entries of others.

        Returns:
            int64 [T], the number of layers that took each row.
        """
        storage = self._storage
        for sequence, rows in self._chunks:
            places = self.places[rows]
            by_token = storage.index[:, places].t().contiguous()  # [n, R]
            is_taken = by_token >= 0
            source = by_token[is_taken].long()
            number = self._starts[sequence] + torch.arange(len(source), device=source.device)
            target = self._slots(torch.full_like(number, sequence), number)
            storage.k[target], storage.v[target] = storage.k[source], storage.v[source]
            by_token[is_taken] = target.int()
            storage.index[:, places] = by_token.t()
        return (storage.index[:, self.places] >= 0).sum(0)

    def by_name(self) -> dict[tuple[str, int], Tensor]:
        """Entries of each (request, companion) after this step, int64 [1]."""
        return {name: self.counts[i : i + 1] for i, name in enumerate(self._names)}
