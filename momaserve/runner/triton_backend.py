"""The backend of Triton kernels, with CUDA graphs for decoding steps. Needs Triton.

On CPU tensors, for tests, kernels run under Triton's interpreter and nothing is captured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from momaserve.core.plan import StepPlan
from momaserve.kernels.triton import norms, sampling
from momaserve.kernels.triton.checks import check_head_dim
from momaserve.layers.batch import ForwardBatch
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.runner.backends import Backend
from momaserve.runner.gpu_buffers import StepBuffers, StepShape
from momaserve.runner.gpu_model import GpuModel
from momaserve.runner.gpu_sampler import GpuSampler
from momaserve.runner.gpu_step import GpuBatch, StepLayout
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.sampler import Sampler
from momaserve.runner.step_entries import StepEntries

logger = logging.getLogger(__name__)


def obstacle_to(config: ModelConfig) -> str | None:
    """Why the kernels cannot compute a model of these shapes, or None."""
    try:
        check_head_dim(config.head_dim)
    except ValueError as error:
        return str(error)
    if config.hidden_size > norms.MAX_WIDTH:
        return f"hidden_size {config.hidden_size} is more than {norms.MAX_WIDTH}"
    if config.vocab_size > sampling.MAX_VOCAB:
        return f"vocab_size {config.vocab_size} is more than {sampling.MAX_VOCAB}"
    return None


def triton_backend(
    model: MomaModel, storage: KVStorage, sampler: Sampler, *, keep_weights: bool
) -> Backend:
    """Lays out the weights of `model`, and gives up its own unless they are to be kept."""
    laid_out = GpuModel(model, storage, keep_weights=keep_weights)
    graphs = GraphCache(laid_out.forward, storage.k.device)

    def forward(plan: StepPlan, batch: ForwardBatch, entries: StepEntries | None) -> Tensor:
        assert isinstance(batch, GpuBatch) and batch.routing.noise is None
        assert batch.routing.rule is None
        hidden = graphs.run(batch.buffers)[: len(batch.token_ids)]
        if batch.observer is not None:
            _report(laid_out, batch)
        return hidden

    layout = StepLayout(model.config, storage)
    sample = GpuSampler(sampler).sample
    return Backend("triton", forward, laid_out.logits, sample, layout)


def _report(model: GpuModel, batch: GpuBatch) -> None:
    """Tells the observer what a step selected, by copies: the buffers are the next step's soon.

    What routers read and scored is not kept: observers get tensors without columns for it.
    """
    observer, buffers, modality = batch.observer, batch.buffers, batch.modality
    assert observer is not None
    selected = buffers.places[:, : len(modality)] >= 0  # [L, T, E]
    taken = buffers.taken[:, : len(modality)].clone()  # [R, T]
    nothing = torch.empty(len(modality), 0, device=modality.device)
    eligible = [(scope, scope.eligible(modality)) for scope in model.group_scopes()]
    for layer, by_expert in enumerate(selected):
        depth = model.depth_of(layer)
        if depth is not None:
            routed = depth.scope.eligible(modality)
            mine = taken[depth.number]
            observer.depth(layer, nothing, nothing, routed, mine & routed)
        for scope, may in eligible:
            if not scope.has_router or not batch.modalities.intersection(scope.modalities):
                continue
            seen = may if depth is None else may & taken[depth.number]
            chosen = by_expert[:, scope.first : scope.stop]
            observer.experts(layer, scope.name, nothing, nothing, seen, chosen)


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    hidden: Tensor
    """[T, D], what a replay fills."""


class GraphCache:
    """Runs steps; a decoding step's launches are captured when its shape comes for the first
    time, and replayed from then on. All graphs share one memory pool, since they run in turn."""

    def __init__(self, forward: Callable[[StepBuffers], Tensor], device: torch.device) -> None:
        self._forward = forward
        self._captures = device.type == "cuda"
        self._captured: dict[StepShape, _Captured] = {}
        self._pool: Any = None
        """What torch calls a handle."""

    def run(self, buffers: StepBuffers) -> Tensor:
        """Hidden states [T, D], to be read before the next step."""
        shape = buffers.shape
        if not self._captures or shape.max_q > 1 or buffers.num_segments:
            return self._forward(buffers)
        captured = self._captured.get(shape)
        if captured is not None:
            captured.graph.replay()
            return captured.hidden
        hidden = self._forward(buffers)  # the step itself; it also compiles the kernels
        stream = torch.cuda.current_stream()
        try:
            self._captured[shape] = self._capture(buffers)
        except Exception:  # the step has run, and its requests are not to pay for it
            logger.exception("cannot capture %s; steps are launched one by one from now on", shape)
            torch.cuda.set_stream(stream)
            self._captures = False
        return hidden

    @property
    def num_captured(self) -> int:
        return len(self._captured)

    def _capture(self, buffers: StepBuffers) -> _Captured:
        """Captures without running: what a step writes is written once."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = self._forward(buffers)
        logger.debug("captured decoding steps of %s", buffers.shape)
        return _Captured(graph, hidden)
