"""The memory behind KV blocks. Which block belongs to whom is the scheduler's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from momaserve.errors import ConfigError
from momaserve.models.config import ModelConfig
from momaserve.runner.upload import upload

DEFAULT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What a block is made of: slots, each with room for K and V of one token in one layer.

    A block holds either `block_size` consecutive tokens of one sequence, plain layer by plain
    layer, or entries of depth-routed layers, in any order.
    """

    block_size: int
    plain: tuple[int, ...]
    """Layers that keep every token."""
    routed: tuple[int, ...]
    """Layers with a depth router."""

    @classmethod
    def of(cls, config: ModelConfig, block_size: int) -> KVLayout:
        depth = config.depth_routing
        routed = () if depth is None else tuple(sorted(depth.layers))
        plain = tuple(i for i in range(config.num_hidden_layers) if i not in routed)
        return cls(block_size, plain, routed)

    @property
    def slots_per_block(self) -> int:
        """With depth routers in all layers, a block of tokens names them and holds nothing."""
        return self.block_size * max(1, len(self.plain))

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of one sequence, should every layer keep all of its tokens."""
        entry_blocks = -(-num_tokens * len(self.routed) // self.slots_per_block)
        return -(-num_tokens // self.block_size) + entry_blocks


class KVStorage:
    """K and V of every slot, and where depth-routed layers keep which token.

    In a plain layer the slot of a token is block * slots_per_block + offset in the block, counted
    in that layer's own view of the memory (`keys`, `values`). In a depth-routed layer it is
    anywhere: `index` tells it by the token's place, block * block_size + offset.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout = KVLayout.of(config, block_size)
        shape = (
            num_blocks * layout.slots_per_block,
            config.num_key_value_heads,
            config.head_dim,
        )
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN would be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        places = (len(layout.routed), num_blocks * block_size)
        self.index = torch.full(places, -1, dtype=torch.int32, device=device)
        """Slots by depth-routed layer and place; -1 where the layer skipped the token."""

    @property
    def num_bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes + self.index.nbytes

    def keys(self, layer: int) -> Tensor:
        """K as a plain layer sees them, [slots, G, K]."""
        return self.k[self._offset(layer) :]

    def values(self, layer: int) -> Tensor:
        return self.v[self._offset(layer) :]

    def _offset(self, layer: int) -> int:
        return self.layout.plain.index(layer) * self.layout.block_size

    def index_of(self, layer: int) -> Tensor:
        """`index` of one depth-routed layer, int32 [places]."""
        return self.index[self.layout.routed.index(layer)]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of tokens, (from, to) each. Their entries in depth-routed layers are
        written once, so the copies share them."""
        if not copies:
            return
        source, target = upload(np.array(copies), self.k.device).unbind(1)
        for memory in (self.k, self.v):
            blocks = memory.view(-1, self.layout.slots_per_block, *memory.shape[1:])
            blocks[target] = blocks[source]
        size = self.layout.block_size
        index = self.index.view(len(self.index), self.index.shape[1] // size, size)
        index[:, target] = index[:, source]


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of K and V in one block."""
    num_slots = KVLayout.of(config, block_size).slots_per_block
    return 2 * num_slots * config.num_key_value_heads * config.head_dim * dtype.itemsize


def choose_num_blocks(
    config: ModelConfig,
    *,
    block_size: int,
    dtype: torch.dtype,
    kv_cache_bytes: int | None,
    max_num_requests: int,
    max_model_len: int,
) -> int:
    """How many blocks to hold: room for every running request, within reason, if not told.

    Raises:
        ConfigError: `kv_cache_bytes` is less than one block.
    """
    size = block_bytes(config, block_size, dtype)
    per_request = KVLayout.of(config, block_size).blocks_for(max_model_len)
    if kv_cache_bytes is None:
        return max(per_request, min(max_num_requests * per_request, DEFAULT_BYTES // size))
    if kv_cache_bytes < size:
        raise ConfigError(f"kv_cache_bytes {kv_cache_bytes} is less than one block, {size} bytes")
    return kv_cache_bytes // size
