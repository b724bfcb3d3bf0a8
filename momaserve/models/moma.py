"""The MoMa model: embedding, blocks, head (model.md, sections 2 to 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momaserve.config import RoutingPolicy
from momaserve.kernels import reference
from momaserve.layers.attention import SelfAttention
from momaserve.layers.batch import ForwardBatch
from momaserve.layers.block import Block, DepthRouter, RMSNorm
from momaserve.layers.experts import ExpertGroup, ExpertLayer
from momaserve.layers.routing import Router
from momaserve.models.config import ModelConfig


def _block(config: ModelConfig, layer: int, dtype: torch.dtype) -> Block:
    def norm() -> RMSNorm:
        return RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    depth = config.depth_routing
    capacity = depth.capacity_of(layer) if depth is not None else None
    depth_router = (
        DepthRouter(config.hidden_size, depth.aux_hidden_size, capacity, depth.modalities)
        if depth is not None and capacity is not None
        else None
    )
    groups = [
        ExpertGroup(
            name=group.name,
            modalities=group.modalities,
            hidden_size=config.hidden_size,
            num_experts=group.num_experts,
            intermediate_size=group.intermediate_size,
            aux_hidden_size=group.aux_hidden_size,
            dtype=dtype,
        )
        for group in config.expert_groups
    ]
    return Block(
        norm_order=config.norm_order,
        attention=SelfAttention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qk_norm=config.qk_norm,
            dtype=dtype,
        ),
        experts=ExpertLayer(groups),
        attn_norm=norm(),
        ffn_norm=norm(),
        depth_router=depth_router,
    )


class MomaModel(nn.Module):
    """A whole model. Routers are float32; all other weights have `dtype`.

    Built empty (parameters unset): `weights.load_model` or `training` fill it.
    """

    rope: Tensor

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.blocks = nn.ModuleList(
            _block(config, layer, dtype) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Parameter(torch.empty(shape, dtype=dtype))
        )
        self.register_buffer("rope", torch.empty(0), persistent=False)

    def set_rope(self, num_positions: int) -> None:
        """Prepare RoPE angles for positions [0, num_positions)."""
        config = self.config
        table = reference.rope_table(num_positions, config.head_dim, config.rope_theta)
        self.rope = table.to(self.embed_tokens.device)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Final hidden states, normed: [T, D]."""
        x = F.embedding(batch.token_ids, self.embed_tokens)
        angles = self.rope[batch.positions]
        for layer, block in enumerate(self.blocks):
            x = block(layer, x, angles, batch)
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor, ids: range | None = None) -> Tensor:
        """Final hidden states [S, D] -> float32 logits [S, V], or [S, len(ids)] of some ids."""
        head: Tensor = self.embed_tokens if self.lm_head is None else self.lm_head
        if ids is not None:
            head = head[ids.start : ids.stop]
        return F.linear(hidden, head).float()

    def routers(self) -> list[Router]:
        """Every router of the model, depth routers included."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def missing_for(self, policy: RoutingPolicy) -> str | None:
        """Why this model cannot be routed by `policy`, or None when it can."""
        if policy is RoutingPolicy.CAUSAL and any(r.aux is None for r in self.routers()):
            return (
                "this checkpoint has no auxiliary routers, which causal routing needs; "
                "train them with `momaserve fit-routers`"
            )
        if policy is RoutingPolicy.CALIBRATED and any(
            r.threshold_logits is None for r in self.routers()
        ):
            return (
                "this checkpoint has no router thresholds, which calibrated routing needs; "
                "make them with `momaserve fit-routers`"
            )
        return None
