"""Self-attention shared by all modalities; where K/V live is the batch's business."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from momaserve.kernels import reference
from momaserve.layers.batch import ForwardBatch


class HeadNorm(nn.Module):
    """LayerNorm over the head dim with its own weight and bias per head."""

    def __init__(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_heads, head_dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[T, H, K] -> [T, H, K]."""
        return reference.head_layer_norm(x, self.weight, self.bias)


class SelfAttention(nn.Module):
    """q, k, v, o projections without bias, optional QK-norm, RoPE, grouped kv heads."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, dtype=dtype)

        self.q_proj = linear(hidden_size, num_heads * head_dim)
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim)
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim)
        self.o_proj = linear(num_heads * head_dim, hidden_size)
        self.q_norm = HeadNorm(num_heads, head_dim, dtype) if qk_norm else None
        self.k_norm = HeadNorm(num_kv_heads, head_dim, dtype) if qk_norm else None

    def project(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D], angles [T, 2, K/2] -> q [T, H, K], k and v [T, G, K], normed and rotated."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return reference.apply_rope(q, angles), reference.apply_rope(k, angles), v

    def forward(
        self, layer: int, x: Tensor, angles: Tensor, taken: Tensor | None, batch: ForwardBatch
    ) -> Tensor:
        """x [T, D] -> [T, D]."""
        assert batch.attention is not None
        q, k, v = self.project(x, angles)
        out: Tensor = self.o_proj(batch.attention(layer, q, k, v, taken).flatten(1))
        return out
