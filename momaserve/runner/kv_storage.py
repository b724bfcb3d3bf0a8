"""The memory behind KV blocks. Which block belongs to whom is the scheduler's business."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from momaserve.errors import ConfigError
from momaserve.models.config import ModelConfig

DEFAULT_BYTES = 1 << 30


class KVStorage:
    """K and V of every layer and slot; slot = block id * block_size + offset in the block.

    Layers with a depth router also hold, per slot, whether they took the token: the K/V of
    skipped tokens are stored but never visible.
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
        self.block_size = block_size
        shape = (
            config.num_hidden_layers,
            num_blocks * block_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN would be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        depth = config.depth_routing
        self.taken: dict[int, Tensor] = {
            layer: torch.zeros(shape[1], dtype=torch.bool, device=device)
            for layer in (depth.layers if depth is not None else ())
        }

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each, in all layers."""
        if not copies:
            return
        source, target = torch.tensor(copies, device=self.k.device).unbind(1)
        for memory in (self.k, self.v):
            blocks = memory.view(len(memory), -1, self.block_size, *memory.shape[2:])
            blocks[:, target] = blocks[:, source]
        for taken in self.taken.values():
            flags = taken.view(-1, self.block_size)
            flags[target] = flags[source]


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, K and V."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * block_size * dtype.itemsize


def choose_num_blocks(
    config: ModelConfig,
    *,
    block_size: int,
    dtype: torch.dtype,
    kv_cache_bytes: int | None,
    max_num_requests: int,
    max_model_len: int,
) -> int:
    """How many blocks to hold.

    Raises:
        ConfigError: `kv_cache_bytes` is less than one block.
    """
    size = block_bytes(config, block_size, dtype)
    per_request = -(-max_model_len // block_size)
    if kv_cache_bytes is None:
        return max(per_request, min(max_num_requests * per_request, DEFAULT_BYTES // size))
    if kv_cache_bytes < size:
        raise ConfigError(f"kv_cache_bytes {kv_cache_bytes} is less than one block, {size} bytes")
    return kv_cache_bytes // size
