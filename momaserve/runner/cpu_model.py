"""The MoMa model on compiled CPU kernels: weights packed once, the block forward of each step.

The arithmetic is that of `models.moma`, with float32 activations whatever the weights' format.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.kernels import reference
from momaserve.kernels.cpu import experts, glue, linear, routing
from momaserve.kernels.cpu.linear import Array
from momaserve.kernels.cpu.tile import TILE
from momaserve.layers.batch import POLICY_CODES, ForwardBatch
from momaserve.layers.block import Block, DepthRouter
from momaserve.layers.experts import ExpertGroup
from momaserve.layers.routing import Router
from momaserve.modality import Modality
from momaserve.models.moma import MomaModel
from momaserve.runner.block_attention import BlockAttention
from momaserve.runner.packing import give_up, give_up_matrices
from momaserve.runner.routing_recorder import RoutingRecorder

_SHARED_PRODUCTS = 2_500_000
"""Products from which several threads share a matrix: some 30 microseconds of one thread. Threads
meet at the end of every matrix, and where the processor has other work too, such as a server's, one
of them may come late by milliseconds."""
_READ_ROWS = 5
"""Up to so many rows reading the matrix is what takes time, not multiplying."""


@dataclass(frozen=True, slots=True)
class _Router:
    weight: Array
    """float32 [E, D]."""
    fc1: Array | None
    """Packed; None without auxiliary router."""
    fc2: Array
    """float32 [E, A]."""
    thresholds: Array
    """float32 [E], of calibrated routing."""
    zeros: Array
    """float32 [E], of the policies that ask for more than 0."""
    capacity: float | None

    @classmethod
    def of(cls, router: Router) -> _Router:
        aux, thresholds = router.aux, router.threshold_logits
        zeros = np.zeros(len(router.weight), np.float32)
        return cls(
            weight=_float32(router.weight),
            fc1=None if aux is None else linear.pack(aux.fc1.weight.detach()),
            fc2=zeros[:, None] if aux is None else _float32(aux.fc2.weight),
            thresholds=zeros if thresholds is None else _float32(thresholds),
            zeros=zeros,
            capacity=router.capacity,
        )


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    modalities: tuple[Modality, ...]
    gate_up: Array
    down: Array
    router: _Router | None

    @classmethod
    def of(cls, group: ExpertGroup) -> _Group:
        return cls(
            name=group.name,
            modalities=group.modalities,
            gate_up=experts.pack_gate_up(group.gate_proj.detach(), group.up_proj.detach()),
            down=experts.pack_down(group.down_proj.detach()),
            router=None if group.router is None else _Router.of(group.router),
        )


@dataclass(frozen=True, slots=True)
class _Depth:
    router: _Router
    modalities: tuple[Modality, ...]

    @classmethod
    def of(cls, depth: DepthRouter) -> _Depth:
        return cls(_Router.of(depth.router), depth.modalities)


@dataclass(frozen=True, slots=True)
class _Layer:
    is_post_norm: bool
    qkv: Array
    """Packed q, k and v projections, one below the other."""
    o: Array
    head_weight: Array
    """float32 [H + G, K] of the QK-norm; no rows without it."""
    head_bias: Array
    attn_norm: Array
    ffn_norm: Array
    groups: tuple[_Group, ...]
    depth: _Depth | None

    @classmethod
    def of(cls, block: Block) -> _Layer:
        attention = block.self_attn
        projections = [
            module.weight.detach()
            for module in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        heads = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
        empty = np.empty((0, attention.head_dim), np.float32)
        groups: list[_Group] = []
        for group in block.experts.groups:
            assert isinstance(group, ExpertGroup)
            groups.append(_Group.of(group))
        return cls(
            is_post_norm=block.is_post_norm,
            qkv=linear.pack(torch.cat(projections)),
            o=linear.pack(attention.o_proj.weight.detach()),
            head_weight=np.concatenate([empty, *(_float32(norm.weight) for norm in heads)]),
            head_bias=np.concatenate([empty, *(_float32(norm.bias) for norm in heads)]),
            attn_norm=_float32(block.attn_norm.weight),
            ffn_norm=_float32(block.ffn_norm.weight),
            groups=tuple(groups),
            depth=None if block.depth_router is None else _Depth.of(block.depth_router),
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """What layers share that compute the same rows: all of a forward pass, or some."""

    batch: ForwardBatch
    attention: BlockAttention
    row_numbers: Array
    """int64 [T], what these rows are among all of the pass."""
    slots: Array | None
    """int64 [T], where a depth-routed layer puts their K/V; None stands for a plain layer."""
    rows: Array
    """int64 [T], 0 to T - 1."""
    positions: Array
    modality: Array
    """int8 [T]."""
    policies: Array
    """int8 [T], POLICY_CODES."""
    found: dict[tuple[Modality, ...], Array]
    """What `rows_of` has found."""

    @classmethod
    def of(cls, batch: ForwardBatch, attention: BlockAttention) -> _Step:
        rows = np.arange(len(batch.token_ids))
        return cls(
            batch=batch,
            attention=attention,
            row_numbers=rows,
            slots=None,
            rows=rows,
            positions=batch.positions.numpy(),
            modality=batch.modality.numpy(),
            policies=batch.routing.policy.numpy(),
            found={},
        )

    def only(self, rows: Array, slots: Array) -> _Step:
        """The part of a step that a depth-routed layer takes: `rows` of all, int64 [R]."""
        return _Step(
            batch=self.batch,
            attention=self.attention,
            row_numbers=rows,
            slots=slots[rows],
            rows=self.rows[: len(rows)],
            positions=self.positions[rows],
            modality=self.modality[rows],
            policies=self.policies[rows],
            found={},
        )

    def rows_of(self, modalities: tuple[Modality, ...]) -> Array:
        """int64, the rows of these modalities; the same for all layers that share the step."""
        if modalities not in self.found:
            self.found[modalities] = self.of_modalities(modalities).nonzero()[0]
        return self.found[modalities]

    def of_modalities(self, modalities: tuple[Modality, ...]) -> Array:
        """bool [T]."""
        if len(modalities) == len(Modality):
            return np.ones(len(self.rows), np.bool_)
        mine: Array = self.modality == int(modalities[0])
        for modality in modalities[1:]:
            mine |= self.modality == int(modality)
        return mine


class CpuModel:
    """Weights of a `MomaModel` laid out for the kernels."""

    def __init__(self, model: MomaModel, *, threads: bool, keep_weights: bool) -> None:
        """
        Args:
            threads: whether several threads share the work of a step.
            keep_weights: whether the matrices of `model` stay; else each is freed as soon as it
                is packed.
        """
        config = model.config
        self._config = config
        self._threads = threads
        self._eps = np.float32(config.rms_norm_eps)
        self._embedding = _as_stored(model.embed_tokens)
        self._norm = _float32(model.norm.weight)
        self._rope = model.rope.numpy()
        self._layers: list[_Layer] = []
        for block in model.blocks:
            assert isinstance(block, Block)
            self._layers.append(_Layer.of(block))
            if not keep_weights:
                give_up_matrices(block)
        head = model.embed_tokens if model.lm_head is None else model.lm_head
        self._head = linear.pack(head.detach())
        if not keep_weights and model.lm_head is not None:
            give_up(model.lm_head)

    def forward(self, batch: ForwardBatch, attention: BlockAttention) -> Tensor:
        """Final hidden states, normed: float32 [T, D]."""
        assert batch.routing.noise is None and batch.routing.rule is None
        token_ids = batch.token_ids.numpy()
        step = _Step.of(batch, attention)
        x = np.empty((len(token_ids), self._config.hidden_size), np.float32)
        glue.embed(token_ids, self._embedding, x)
        for index, layer in enumerate(self._layers):
            x = self._block(index, layer, x, step)
        glue.rms_norm(x, self._norm, self._eps, x)
        return torch.from_numpy(x)

    def logits(self, hidden: Tensor, ids: range) -> Tensor:
        """Final hidden states [S, D] -> float32 logits [S, len(ids)] of a range of ids."""
        x = hidden.contiguous().numpy()
        first = ids.start // TILE  # tiles of other ids are not read
        out = self._multiply(x, np.arange(len(x)), self._head[first : -(-ids.stop // TILE)])
        offset = first * TILE
        return torch.from_numpy(out)[:, ids.start - offset : ids.stop - offset]

    def _multiply(self, x: Array, rows: Array, w: Array) -> Array:
        out = np.empty((len(rows), w.shape[0] * TILE), np.float32)
        if self._is_shared(len(rows), w):
            linear.linear_threaded(x, rows, w, out)
        else:
            linear.linear(x, rows, w, out)
        return out

    def _is_shared(self, num_rows: int, w: Array) -> bool:
        """Whether several threads multiply rows with a packed matrix [.., N, I, ..]."""
        num_weights = w.shape[-3] * TILE * w.shape[-2]
        return self._threads and num_weights * max(num_rows, _READ_ROWS) >= _SHARED_PRODUCTS

    def _block(self, index: int, layer: _Layer, x: Array, step: _Step) -> Array:
        """x [T, D] -> [T, D]; may be the same array."""
        if layer.depth is None:
            return self._compute(index, layer, x, step)
        taken, weights = self._choose(index, layer.depth, x, step)
        slots = step.attention.take(index, taken)
        rows = taken.nonzero()[0]
        if not len(rows):
            return x  # and nothing of the layer is read
        y = self._compute(index, layer, x[rows], step.only(rows, slots))
        out = x.copy()  # an observer may have kept x
        glue.blend(out, rows, y, weights[rows])
        return out

    def _choose(self, index: int, depth: _Depth, x: Array, step: _Step) -> tuple[Array, Array]:
        """Rows that a depth-routed layer takes, bool [T], and their weights, float32 [T]."""
        routed = step.of_modalities(depth.modalities)
        mine = routed.nonzero()[0]
        logits, weights, selected = self._route(depth.router, x, mine, step)
        observer = step.batch.observer
        if isinstance(observer, RoutingRecorder) and not observer.keeps_rows:
            observer.add_depth_counts(index, len(mine), int(np.count_nonzero(selected)))
        elif observer is not None:
            every = np.zeros(len(x), np.float32)
            every[mine] = logits[:, 0]
            chosen = np.zeros(len(x), np.bool_)
            chosen[mine] = selected[:, 0]
            observer.depth(index, *map(torch.from_numpy, (x, every, routed, chosen)))
        taken = ~routed
        taken[mine] = selected[:, 0]
        scale = np.ones(len(x), np.float32)
        scale[mine] = weights[:, 0]
        return taken, scale

    def _compute(self, index: int, layer: _Layer, x: Array, step: _Step) -> Array:
        """The block itself, [T, D] -> [T, D]."""
        read = x
        if not layer.is_post_norm:
            read = np.empty_like(x)
            glue.rms_norm(x, layer.attn_norm, self._eps, read)
        h = np.empty_like(x)
        self._residual(x, self._attend(index, layer, read, step), layer, "attn", h)
        read = h
        if not layer.is_post_norm:
            read = np.empty_like(x)
            glue.rms_norm(h, layer.ffn_norm, self._eps, read)
        out = np.empty_like(x)
        self._residual(h, self._experts(index, layer, read, step), layer, "ffn", out)
        return out

    def _residual(self, x: Array, y: Array, layer: _Layer, part: str, out: Array) -> None:
        if layer.is_post_norm:
            weight = layer.attn_norm if part == "attn" else layer.ffn_norm
            glue.add_rms_norm(x, y, weight, self._eps, out)
        else:
            glue.add(x, y, out)

    def _attend(self, index: int, layer: _Layer, x: Array, step: _Step) -> Array:
        config = self._config
        qkv = self._multiply(x, step.rows, layer.qkv)
        if len(layer.head_weight):
            glue.norm_heads(qkv, layer.head_weight, layer.head_bias, config.head_dim)
        num_heads = config.num_attention_heads + config.num_key_value_heads
        glue.rotate(qkv, self._rope, step.positions, num_heads)
        out = np.empty((len(x), config.num_attention_heads * config.head_dim), np.float32)
        if step.slots is None:
            step.attention.attend(index, qkv, out)
        else:
            step.attention.attend_taken(index, step.row_numbers, step.slots, qkv, out)
        return self._multiply(out, step.rows, layer.o)

    def _experts(self, index: int, layer: _Layer, u: Array, step: _Step) -> Array:
        """u [T, D] -> [T, D]; zero for tokens without expert."""
        out = np.zeros_like(u)
        for group in layer.groups:
            rows = step.rows_of(group.modalities)
            if not len(rows):
                continue
            if group.router is None:
                weights = np.ones((len(rows), 1), np.float32)
                selected = np.ones((len(rows), 1), np.bool_)
            else:
                logits, weights, selected = self._route(group.router, u, rows, step)
                observer = step.batch.observer
                if isinstance(observer, RoutingRecorder) and not observer.keeps_rows:
                    counts = np.zeros(2 * selected.shape[1] + 1, np.int64)
                    routing.count(selected, counts)
                    observer.add_expert_counts(index, group.name, len(rows), counts)
                elif observer is not None:
                    self._tell(index, group.name, u, rows, logits, selected, step)
            is_shared = self._is_shared(len(rows), group.gate_up)  # as if each had one expert
            experts.routed_experts(
                u, rows, selected, weights, group.gate_up, group.down, is_shared, out
            )
        return out

    def _route(
        self, router: _Router, x: Array, rows: Array, step: _Step
    ) -> tuple[Array, Array, Array]:
        """Main logits, affinities and selections of the rows: [R, E] each."""
        shape = (len(rows), len(router.weight))
        logits, weights = np.empty(shape, np.float32), np.empty(shape, np.float32)
        selected = np.zeros(shape, np.bool_)
        routing.scores(x, rows, router.weight, logits, weights)
        plan = step.batch.routing
        for policy in plan.policies:
            code = POLICY_CODES[policy]
            if policy is RoutingPolicy.CAUSAL:
                assert router.fc1 is not None, "causal routing without auxiliary router"
                causal = np.empty(shape, np.float32)
                is_shared = self._is_shared(len(rows), router.fc1)
                routing.auxiliary(x, rows, router.fc1, router.fc2, is_shared, causal)
                routing.select(causal, router.zeros, step.policies, rows, code, selected)
            elif policy is RoutingPolicy.CALIBRATED:
                routing.select(logits, router.thresholds, step.policies, rows, code, selected)
            elif policy is RoutingPolicy.THRESHOLD:
                routing.select(logits, router.zeros, step.policies, rows, code, selected)
            else:
                # Whole prompts are rare, and the sort is torch's.
                chosen = reference.expert_choice(
                    torch.from_numpy(logits),
                    torch.ones(len(rows), dtype=torch.bool),
                    plan.segments[torch.from_numpy(step.row_numbers[rows])],
                    plan.num_segments,
                    router.capacity,
                )
                selected |= chosen.numpy()
        return logits, weights, selected

    @staticmethod
    def _tell(
        index: int,
        group: str,
        u: Array,
        rows: Array,
        logits: Array,
        selected: Array,
        step: _Step,
    ) -> None:
        """Report a group's selections as if its router had seen every row of the pass."""
        assert step.batch.observer is not None
        where = step.row_numbers[rows]
        total = len(step.batch.token_ids)
        read = u
        if len(u) < total:
            read = np.zeros((total, u.shape[1]), np.float32)
            read[step.row_numbers] = u
        eligible = np.zeros(total, np.bool_)
        eligible[where] = True
        every, chosen = logits, selected
        if len(rows) < total:
            every = np.zeros((total, logits.shape[1]), np.float32)
            chosen = np.zeros((total, logits.shape[1]), np.bool_)
            every[where], chosen[where] = logits, selected
        step.batch.observer.experts(
            index, group, *map(torch.from_numpy, (read, every, eligible, chosen))
        )


def _float32(tensor: Tensor) -> Array:
    return tensor.detach().float().contiguous().numpy()


def _as_stored(tensor: Tensor) -> Array:
    """float32 as it is, bfloat16 as uint16; shares memory with the tensor."""
    tensor = tensor.detach()
    if tensor.dtype is torch.float32:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(np.uint16)
