"""The MoMa model on Triton kernels: weights laid out once, the block forward of each step.

The arithmetic is that of `models.moma`. What runs depends on the shapes of a step alone; which
experts, which rows and how long the sequences are is data, so a captured graph serves every mix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from momaserve.kernels import reference
from momaserve.kernels.reference_depth import depth_routers
from momaserve.kernels.reference_experts import ExpertWeights
from momaserve.kernels.reference_routing import GroupRouter, RouterWeights
from momaserve.kernels.triton import attention, depth, experts, heads, norms, routing
from momaserve.layers.block import Block, DepthRouter
from momaserve.layers.experts import ExpertGroup
from momaserve.layers.routing import Router
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.runner.gpu_buffers import StepBuffers
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.packing import give_up, give_up_matrices


@dataclass(frozen=True, slots=True)
class Scope:
    """Experts `first` to `stop` of a layer, which choose among the tokens of some modalities."""

    name: str
    modalities: tuple[Modality, ...]
    first: int
    stop: int
    capacity: float | None
    has_router: bool

    def eligible(self, modality: Tensor) -> Tensor:
        """bool [T] of modality int8 [T]."""
        if len(self.modalities) == len(Modality):
            return modality >= 0
        return modality == int(self.modalities[0])


@dataclass(frozen=True, slots=True)
class Depth:
    routers: RouterWeights
    scope: Scope
    number: int
    """Among the depth-routed layers."""

    @classmethod
    def of(cls, router: DepthRouter, number: int) -> Depth:
        scores = router.router
        fc1, fc2 = _auxiliary(scores)
        return cls(
            depth_routers(
                scores.weight.detach(), fc1, fc2, scores.threshold_logits, router.modalities
            ),
            Scope("depth", router.modalities, 0, 1, scores.capacity, True),
            number,
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: Tensor
    """[(H + 2G) K, D]: q, k and v projections, one below the other."""
    o: Tensor
    head_weight: Tensor | None
    """[H + G, K] of the QK-norm."""
    head_bias: Tensor | None
    attn_norm: Tensor
    ffn_norm: Tensor
    routers: RouterWeights
    experts: tuple[ExpertWeights, ...]
    """One launch each: neighbouring groups of one size are together."""
    scopes: tuple[Scope, ...]
    """Groups in configuration order."""
    depth: Depth | None
    offset: int
    """Of a plain layer's slots in a block."""

    @classmethod
    def of(cls, block: Block, index: int, storage: KVStorage) -> _Layer:
        mixer, layout = block.self_attn, storage.layout
        projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        head_norms = [norm for norm in (mixer.q_norm, mixer.k_norm) if norm is not None]
        groups: list[ExpertGroup] = []
        for group in block.experts.groups:
            assert isinstance(group, ExpertGroup)
            groups.append(group)
        scopes = _scopes(groups)
        is_routed = block.depth_router is not None
        return cls(
            qkv=torch.cat([module.weight.detach() for module in projections]),
            o=mixer.o_proj.weight.detach(),
            head_weight=torch.cat([n.weight.detach() for n in head_norms]) if head_norms else None,
            head_bias=torch.cat([n.bias.detach() for n in head_norms]) if head_norms else None,
            attn_norm=block.attn_norm.weight.detach(),
            ffn_norm=block.ffn_norm.weight.detach(),
            routers=_routers(groups, scopes),
            experts=_expert_weights(groups),
            scopes=scopes,
            depth=None
            if block.depth_router is None
            else Depth.of(block.depth_router, layout.routed.index(index)),
            offset=0 if is_routed else layout.plain.index(index) * layout.block_size,
        )


class GpuModel:
    """Weights of a `MomaModel` laid out for the kernels."""

    def __init__(self, model: MomaModel, storage: KVStorage, *, keep_weights: bool) -> None:
        """
        Args:
            keep_weights: whether the matrices of `model` stay; else each is given up as soon as
                it is laid out.
        """
        self.config: ModelConfig = model.config
        self._storage = storage
        self._model = model
        self._eps = model.config.rms_norm_eps
        self._is_post_norm = model.config.norm_order == "post"
        self._embedding = model.embed_tokens.detach()
        self._norm = model.norm.weight.detach()
        self._layers: list[_Layer] = []
        for index, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            self._layers.append(_Layer.of(block, index, storage))
            if not keep_weights:
                give_up_matrices(block)
        self._head = self._embedding if model.lm_head is None else model.lm_head.detach()
        if not keep_weights and model.lm_head is not None:
            give_up(model.lm_head)

    def forward(self, step: StepBuffers) -> Tensor:
        """Final hidden states, normed: [T, D], padding rows included."""
        x = F.embedding(step.token_ids, self._embedding)
        following = [layer.attn_norm for layer in self._layers[1:]] + [self._norm]
        read = x if self._is_post_norm else norms.rms_norm(x, self._layers[0].attn_norm, self._eps)
        for index, layer in enumerate(self._layers):
            x, read = self._block(index, layer, x, read, following[index], step)
        return norms.rms_norm(x, self._norm, self._eps) if self._is_post_norm else read

    def logits(self, hidden: Tensor, ids: range) -> Tensor:
        """Final hidden states [S, D] -> float32 logits [S, len(ids)] of a range of ids."""
        return F.linear(hidden, self._head[ids.start : ids.stop]).float()

    def group_scopes(self) -> tuple[Scope, ...]:
        """Expert groups, the same in every layer."""
        return self._layers[0].scopes

    def depth_of(self, layer: int) -> Depth | None:
        """The depth router of a layer, if it has one."""
        return self._layers[layer].depth

    def _block(
        self, index: int, layer: _Layer, x: Tensor, read: Tensor, norm: Tensor, step: StepBuffers
    ) -> tuple[Tensor, Tensor]:
        """The layer's output and what the next one reads of it, [T, D] each.

        Args:
            read: x itself in post order, x normed in pre order.
            norm: [D], of what comes next, in pre order.
        """
        found = layer.depth
        if found is None:
            h, y = self._compute(index, layer, x, read, None, step)
            if self._is_post_norm:
                out = norms.add_normed(h, y, layer.ffn_norm, self._eps, out=h)
                return out, out
            return norms.normed_sum(h, y, norm, self._eps, out_sum=h)
        rows = step.taken_rows[found.number]
        chosen = self._choose(x, found.routers, (found.scope,), None, step)
        depth.take(
            x, step.modality, step.policy, found.routers, step.entries[found.number],
            chosen=chosen, out=rows,
        )  # fmt: skip
        # All rows are computed, since how many were taken is the device's secret; those that the
        # layer skips select no expert, are no one's key and are left out here.
        h, y = self._compute(index, layer, x, read, found, step)
        if self._is_post_norm:
            block = norms.add_normed(h, y, layer.ffn_norm, self._eps, out=h)
        else:
            block = h.add_(y)
        places = torch.where(rows.taken, step.numbers, -1)
        out = depth.blend(x, block, rows.weight, places)
        return out, out if self._is_post_norm else norms.rms_norm(out, norm, self._eps)

    def _compute(
        self, index: int, layer: _Layer, x: Tensor, read: Tensor, found: Depth | None,
        step: StepBuffers,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x and attention's part [T, D], and the experts' sum, float32 [T, D], not added yet."""
        o = F.linear(self._attend(layer, read, found, step), layer.o)
        if self._is_post_norm:
            u = h = norms.add_normed(x, o, layer.attn_norm, self._eps)
        else:
            h, u = norms.normed_sum(x, o, layer.ffn_norm, self._eps)
        taken = None if found is None else step.taken[found.number]
        pairs = routing.route(
            u, step.modality, step.policy, layer.routers,
            taken=taken, chosen=self._choose(u, layer.routers, layer.scopes, taken, step),
            out=step.pairs[index],
        )  # fmt: skip
        y = experts.experts(u, pairs, layer.experts[0])
        for weights in layer.experts[1:]:
            experts.experts(u, pairs, weights, out=y, accumulate=True)
        return h, y

    def _attend(
        self, layer: _Layer, read: Tensor, found: Depth | None, step: StepBuffers
    ) -> Tensor:
        """[T, H K]; K/V of the rows go to their slots before."""
        storage, layout = self._storage, self._storage.layout
        q = heads.place_heads(
            F.linear(read, layer.qkv), layer.head_weight, layer.head_bias, self._model.rope,
            step.positions, step.slots if found is None else step.taken_rows[found.number].slots,
            storage.k, storage.v, layer_offset=layer.offset,
        )  # fmt: skip
        attended = attention.paged_attention(
            q, storage.k, storage.v, step.block_tables, step.seq_lens, step.cu_seqlens_q,
            block_size=layout.block_size, block_stride=layout.slots_per_block,
            layer_offset=layer.offset, index=None if found is None else storage.index[found.number],
            max_q=step.shape.max_q, max_len=step.shape.blocks * layout.block_size,
            scratch=step.scratch,
        )  # fmt: skip
        return attended.flatten(1)

    @staticmethod
    def _choose(
        x: Tensor,
        routers: RouterWeights,
        scopes: tuple[Scope, ...],
        taken: Tensor | None,
        step: StepBuffers,
    ) -> Tensor | None:
        """What rows under expert choice selected, bool [T, E]; None in a step without them."""
        if not step.num_segments:
            return None
        logits = F.linear(x.float(), routers.main)
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        for scope in scopes:
            eligible = scope.eligible(step.modality)
            if taken is not None:
                eligible = eligible & taken
            mine = slice(scope.first, scope.stop)
            chosen[:, mine] = reference.expert_choice(
                logits[:, mine], eligible, step.segments, step.num_segments, scope.capacity
            )
        return chosen


def _scopes(groups: list[ExpertGroup]) -> tuple[Scope, ...]:
    scopes: list[Scope] = []
    first = 0
    for group in groups:
        stop = first + len(group.gate_proj)
        router = group.router
        capacity = None if router is None else router.capacity
        modalities = group.modalities
        scopes.append(Scope(group.name, modalities, first, stop, capacity, router is not None))
        first = stop
    return tuple(scopes)


def _routers(groups: list[ExpertGroup], scopes: tuple[Scope, ...]) -> RouterWeights:
    served = {modality for group in groups for modality in group.modalities}
    # No token has a modality that nobody serves, but the kernels' table has a line for each.
    absent = tuple(modality for modality in Modality if modality not in served)
    auxiliary = [_auxiliary(group.router) for group in groups if group.router is not None]
    has_auxiliary = all(fc1 is not None for fc1, _ in auxiliary)
    table: list[GroupRouter] = []
    for group, scope in zip(groups, scopes, strict=True):
        router = group.router
        fc1, fc2 = _auxiliary(router) if router is not None and has_auxiliary else (None, None)
        table.append(
            GroupRouter(
                modalities=group.modalities + (absent if not scope.first else ()),
                num_experts=scope.stop - scope.first,
                main=None if router is None else router.weight.detach(),
                fc1=fc1,
                fc2=fc2,
                thresholds=None if router is None else router.threshold_logits,
            )
        )
    gate = groups[0].gate_proj
    return _narrowed(RouterWeights.stack(table, gate.shape[2], gate.device), gate.dtype)


def _auxiliary(router: Router) -> tuple[Tensor | None, Tensor | None]:
    aux = router.aux
    return (None, None) if aux is None else (aux.fc1.weight.detach(), aux.fc2.weight.detach())


def _narrowed(routers: RouterWeights, dtype: torch.dtype) -> RouterWeights:
    """With `fc1` in the model's format where that holds it exactly: half of what is read."""
    narrow = routers.fc1.to(dtype)
    if not torch.equal(narrow.float(), routers.fc1):
        return routers
    return replace(routers, fc1=narrow)


def _expert_weights(groups: list[ExpertGroup]) -> tuple[ExpertWeights, ...]:
    launches: list[ExpertWeights] = []
    first = 0
    for _, together in groupby(groups, key=lambda group: group.gate_proj.shape[1]):
        mine = list(together)
        parts = [
            torch.cat([getattr(group, name).detach() for group in mine])
            for name in ("gate_proj", "up_proj", "down_proj")
        ]
        launches.append(ExpertWeights.padded(parts[0], parts[1], parts[2], first=first))
        first += launches[-1].num_experts
    return tuple(launches)
