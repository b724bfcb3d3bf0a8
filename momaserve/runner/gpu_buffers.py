"""Memory of one shape of step: its inputs, filled by one copy, and what its kernels write.

A decoding step is padded to a shape that many steps share, and its buffers keep their addresses, so
that a captured graph serves every step of the shape. Letters: T rows, B sequences, L layers, E
experts of a layer, R depth-routed layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momaserve.kernels.reference_depth import EntryTables, TakenRows
from momaserve.kernels.reference_routing import Pairs
from momaserve.kernels.triton.attention_tiles import decode_tiles, num_splits, scratch_shape
from momaserve.models.config import ModelConfig
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.upload import host_bytes

_ALIGNED = 16
"""Bytes; what the kernels' vector loads want of an address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """Sizes of a step; those of a decoding step leave room for others."""

    rows: int
    sequences: int
    blocks: int
    """Width of the block tables."""
    entry_blocks: int
    max_q: int
    """Most rows of one sequence; 1 is a decoding step."""


@dataclass(frozen=True, slots=True)
class _Section:
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    padding: int

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


_NUMPY = {torch.int8: np.int8, torch.int32: np.int32, torch.int64: np.int64}


class HostInputs:
    """The inputs on the host, as views of the memory that is copied; nothing but padding."""

    def __init__(self, memory: Tensor, sections: dict[str, _Section]) -> None:
        raw = memory.numpy()

        def of(name: str) -> NDArray[Any]:
            section = sections[name]
            part = raw[section.start : section.start + section.num_bytes]
            array: NDArray[Any] = part.view(_NUMPY[section.dtype]).reshape(section.shape)
            array[...] = section.padding
            return array

        self.memory = memory
        self.token_ids = of("token_ids")
        self.positions = of("positions")
        self.slots = of("slots")
        self.sequences = of("sequences")
        self.seq_lens = of("seq_lens")
        self.cu_seqlens_q = of("cu_seqlens_q")
        self.block_tables = of("block_tables")
        self.entry_tables = of("entry_tables")
        self.num_entries = of("num_entries")
        self.unknown = of("unknown")
        self.in_flight = of("in_flight")
        self.segments = of("segments")
        self.modality = of("modality")
        self.policy = of("policy")


class StepBuffers:
    """Inputs and what is shared by the layers of a step; allocates no more while it runs but
    activations."""

    def __init__(self, shape: StepShape, config: ModelConfig, storage: KVStorage) -> None:
        self.shape = shape
        self.storage = storage
        self._device = device = storage.k.device
        self._sections = _sections(shape)
        last = max(self._sections.values(), key=lambda section: section.start)
        self._memory = torch.zeros(last.start + last.num_bytes, dtype=torch.uint8, device=device)
        self.token_ids = self._view("token_ids")
        """int32 [T]; 0 in padding rows."""
        self.positions = self._view("positions")
        """int32 [T]."""
        self.slots = self._view("slots")
        """int32 [T], in a plain layer's own view of KV memory; -1 in padding rows."""
        self.sequences = self._view("sequences")
        """int32 [T]; -1 in padding rows."""
        self.seq_lens = self._view("seq_lens")
        """int32 [B]; 0 of padding sequences."""
        self.cu_seqlens_q = self._view("cu_seqlens_q")
        """int32 [B + 1]."""
        self.block_tables = self._view("block_tables")
        """int32 [B, blocks]."""
        self.num_entries = self._view("num_entries")
        """int32 [B], counted up by the step."""
        self.unknown = self._view("unknown")
        """int64 [T]: first the rows whose tokens only the device knows."""
        self.in_flight = self._view("in_flight")
        """int64 [B]: first the sequences whose entries only the device knows."""
        self.segments = self._view("segments")
        """int64 [T], scopes of expert choice; -1 is none."""
        self.modality = self._view("modality")
        """int8 [T]; -1 in padding rows."""
        self.policy = self._view("policy")
        """int8 [T]."""
        self.num_segments = 0

        layout, rows = storage.layout, shape.rows
        num_experts = sum(group.num_experts for group in config.expert_groups)
        most = max(group.num_experts for group in config.expert_groups)
        self.places = _integers(device, config.num_hidden_layers, rows, num_experts)
        """int32 [L, T, E]: -1 where the expert was not selected."""
        pairs = Pairs.empty(rows, num_experts, most, device)
        self.pairs = [
            Pairs(tokens=pairs.tokens, weights=pairs.weights, offsets=pairs.offsets, places=places)
            for places in self.places
        ]
        """By layer."""
        self.taken = torch.empty(len(layout.routed), rows, dtype=torch.bool, device=device)
        """bool [R, T], rows that depth-routed layers compute."""
        shared = TakenRows.empty(rows, device)
        self.taken_rows = [
            TakenRows(
                taken=taken,
                weight=shared.weight,
                slots=shared.slots,
                rows=shared.rows,
                places=shared.places,
                count=shared.count,
            )
            for taken in self.taken
        ]
        """By depth-routed layer."""
        self.entries = [
            EntryTables(
                sequences=self.sequences,
                positions=self.positions,
                cu_seqlens_q=self.cu_seqlens_q,
                block_tables=self.block_tables,
                entry_tables=self._view("entry_tables"),
                num_entries=self.num_entries,
                index=index,
                block_size=layout.block_size,
                block_stride=layout.slots_per_block,
            )
            for index in storage.index
        ]
        self.numbers = torch.arange(rows, dtype=torch.int32, device=device)
        """int32 [T], 0 to T - 1."""
        self.scratch = self._scratch(config)

    def host_inputs(self) -> HostInputs:
        """To be filled and given to `fill`; every step has its own."""
        return HostInputs(host_bytes(self._memory.numel(), self._device), self._sections)

    def fill(self, inputs: HostInputs) -> None:
        """Brings the inputs over, in order with the device's other work."""
        self._memory.copy_(inputs.memory, non_blocking=True)

    def _view(self, name: str) -> Tensor:
        section = self._sections[name]
        part = self._memory[section.start : section.start + section.num_bytes]
        return part.view(section.dtype).view(section.shape)

    def _scratch(self, config: ModelConfig) -> Tensor | None:
        """What the programs of a decoding step's attention leave for each other."""
        shape, device = self.shape, self._device
        if shape.max_q > 1:
            return None
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        itemsize = self.storage.k.element_size()
        tiles = decode_tiles(num_heads // num_kv_heads, config.head_dim, itemsize)
        length = shape.blocks * self.storage.layout.block_size
        count = 1
        if device.type == "cuda":
            count = torch.cuda.get_device_properties(device).multi_processor_count
        splits = num_splits(shape.sequences, num_kv_heads, length, count, tiles)
        if splits == 1:
            return None
        size = scratch_shape(splits, shape.sequences, num_heads, config.head_dim)
        return torch.empty(size, dtype=torch.float32, device=device)


def _sections(shape: StepShape) -> dict[str, _Section]:
    rows, sequences = shape.rows, shape.sequences
    wanted: dict[str, tuple[torch.dtype, int, tuple[int, ...]]] = {
        "token_ids": (torch.int32, 0, (rows,)),
        "positions": (torch.int32, 0, (rows,)),
        "slots": (torch.int32, -1, (rows,)),
        "sequences": (torch.int32, -1, (rows,)),
        "seq_lens": (torch.int32, 0, (sequences,)),
        "cu_seqlens_q": (torch.int32, 0, (sequences + 1,)),
        "block_tables": (torch.int32, 0, (sequences, shape.blocks)),
        "entry_tables": (torch.int32, 0, (sequences, shape.entry_blocks)),
        "num_entries": (torch.int32, 0, (sequences,)),
        "unknown": (torch.int64, 0, (rows,)),
        "in_flight": (torch.int64, 0, (sequences,)),
        "segments": (torch.int64, -1, (rows,)),
        "modality": (torch.int8, -1, (rows,)),
        "policy": (torch.int8, 0, (rows,)),
    }
    sections: dict[str, _Section] = {}
    start = 0
    for name, (dtype, padding, size) in wanted.items():
        sections[name] = section = _Section(start, size, dtype, padding)
        start += -(-section.num_bytes // _ALIGNED) * _ALIGNED
    return sections


def _integers(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)
