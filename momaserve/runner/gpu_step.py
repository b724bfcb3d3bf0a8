"""From a step plan to inputs on the device, in one copy: what the kernels read, and no more.

A decoding step (one row per sequence, no expert choice) is padded to a bucket of rows and a bucket
of blocks, in buffers that all steps of the buckets share. Other steps get buffers of their own,
exactly as large as they need. Tokens and counts that only the device knows come from where the step
in flight leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from momaserve.core.plan import StepPlan
from momaserve.layers.batch import ForwardBatch, RoutingObserver, RoutingPlan
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.request import Request
from momaserve.runner.gpu_buckets import blocks_bucket, rows_bucket
from momaserve.runner.gpu_buffers import HostInputs, StepBuffers, StepShape
from momaserve.runner.gpu_entries import GpuEntries
from momaserve.runner.inputs import HostRows, device_modalities, host_rows, modalities_of
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.step_entries import StepEntries


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBatch(ForwardBatch):
    """Its tensors are views of the buffers: the step's rows without the padding."""

    buffers: StepBuffers


class StepLayout:
    """Lays steps out on the device, and owns the buffers of decoding steps."""

    def __init__(self, config: ModelConfig, storage: KVStorage) -> None:
        self._config = config
        self._storage = storage
        self._decoding: dict[StepShape, StepBuffers] = {}

    def __call__(
        self,
        plan: StepPlan,
        requests: Mapping[str, Request],
        observer: RoutingObserver | None,
        sampling: Mapping[str, Tensor],
        before: Mapping[tuple[str, int], Tensor],
    ) -> tuple[GpuBatch, StepEntries | None]:
        """As `backends.LayOut`."""
        rows = host_rows(plan, requests, self._config)
        buffers = self._buffers_for(plan, rows)
        inputs = buffers.host_inputs()
        kinds = modalities_of(rows.token_ids, self._config)
        in_flight = self._write(plan, rows, kinds, inputs)
        buffers.fill(inputs)
        buffers.num_segments = rows.num_segments
        modalities = frozenset(Modality(kind) for kind in set(kinds))
        if rows.unknown:
            self._insert(torch.cat([sampling[name] for _, name in rows.unknown]), buffers)
            modalities = frozenset(Modality)
        if in_flight:
            counts = torch.cat([before[name] for name in in_flight])
            index = buffers.in_flight[: len(in_flight)]
            buffers.num_entries.index_copy_(0, index, counts.int())
        mine = slice(len(rows.token_ids))
        batch = GpuBatch(
            token_ids=buffers.token_ids[mine],
            positions=buffers.positions[mine],
            modality=buffers.modality[mine],
            modalities=modalities,
            routing=RoutingPlan(
                policies=frozenset(rows.present),
                policy=buffers.policy[mine],
                segments=buffers.segments[mine],
                num_segments=rows.num_segments,
            ),
            observer=observer,
            buffers=buffers,
        )
        return batch, GpuEntries(plan, buffers) if self._storage.layout.routed else None

    def _buffers_for(self, plan: StepPlan, rows: HostRows) -> StepBuffers:
        sequences = plan.sequences
        max_q = max(planned.num_new_tokens for planned in sequences)
        num_blocks = max(len(planned.blocks) for planned in sequences)
        num_entry_blocks = max(1, *(len(planned.entry_blocks) for planned in sequences))
        if max_q > 1 or rows.num_segments:
            exact = StepShape(
                rows=len(rows.token_ids),
                sequences=len(sequences),
                blocks=num_blocks,
                entry_blocks=num_entry_blocks,
                max_q=max_q,
            )
            return StepBuffers(exact, self._config, self._storage)
        bucket = rows_bucket(len(sequences))
        shape = StepShape(
            rows=bucket,
            sequences=bucket,
            blocks=blocks_bucket(num_blocks),
            entry_blocks=blocks_bucket(num_entry_blocks) if self._storage.layout.routed else 1,
            max_q=1,
        )
        if shape not in self._decoding:
            self._decoding[shape] = StepBuffers(shape, self._config, self._storage)
        return self._decoding[shape]

    def _write(
        self, plan: StepPlan, rows: HostRows, kinds: list[int], inputs: HostInputs
    ) -> list[tuple[str, int]]:
        """Fills the host's side; returns the sequences whose entries only the device knows.

        Args:
            kinds: modality of each row, as far as the host knows.
        """
        layout = self._storage.layout
        size, stride = layout.block_size, layout.slots_per_block
        num_rows = len(rows.token_ids)
        inputs.token_ids[:num_rows] = rows.token_ids
        inputs.positions[:num_rows] = rows.positions
        inputs.policy[:num_rows] = rows.policies
        inputs.segments[:num_rows] = rows.segments
        inputs.modality[:num_rows] = kinds
        inputs.unknown[: len(rows.unknown)] = [row for row, _ in rows.unknown]
        inputs.cu_seqlens_q[len(plan.sequences) :] = num_rows
        in_flight: list[tuple[str, int]] = []
        row = 0
        for number, planned in enumerate(plan.sequences):
            count = planned.num_new_tokens
            mine = slice(row, row + count)
            table = inputs.block_tables[number]
            table[: len(planned.blocks)] = planned.blocks
            positions = inputs.positions[mine]
            inputs.slots[mine] = table[positions // size] * stride + positions % size
            inputs.sequences[mine] = number
            inputs.seq_lens[number] = planned.start + count
            inputs.cu_seqlens_q[number] = row
            if layout.routed:
                inputs.entry_tables[number, : len(planned.entry_blocks)] = planned.entry_blocks
                inputs.num_entries[number] = planned.num_entries
                bound = planned.max_num_entries - count * len(layout.routed)
                if bound > planned.num_entries:  # some are in flight
                    inputs.in_flight[len(in_flight)] = number
                    in_flight.append((planned.request_id, planned.companion))
            row += count
        return in_flight

    def _insert(self, token_ids: Tensor, buffers: StepBuffers) -> None:
        """Puts tokens that are being sampled, int64 [n], and their modality into their rows."""
        index = buffers.unknown[: len(token_ids)]
        buffers.token_ids.index_copy_(0, index, token_ids.int())
        buffers.modality.index_copy_(0, index, device_modalities(token_ids, self._config))
