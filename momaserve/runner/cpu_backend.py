"""The backend of compiled CPU kernels. Needs numba."""

from __future__ import annotations

import numba
import torch
from torch import Tensor

from momaserve.core.plan import StepPlan
from momaserve.layers.batch import ForwardBatch
from momaserve.models.moma import MomaModel
from momaserve.runner.backends import Backend
from momaserve.runner.block_attention import BlockAttention, BlockMemory
from momaserve.runner.cpu_model import CpuModel
from momaserve.runner.cpu_sampler import CpuSampler
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.sampler import Sampler


def cpu_backend(
    model: MomaModel, storage: KVStorage, sampler: Sampler, *, keep_weights: bool
) -> Backend:
    """Packs the weights of `model`, and gives up its own unless they are to be kept."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    num_threads = min(torch.get_num_threads(), most)
    is_threaded = num_threads > 1
    memory = BlockMemory(storage)
    packed = CpuModel(model, threads=is_threaded, keep_weights=keep_weights)

    def forward(plan: StepPlan, batch: ForwardBatch) -> Tensor:
        numba.set_num_threads(num_threads)  # of the thread that asks, whichever it is
        return packed.forward(batch, BlockAttention(plan, memory, is_threaded))

    return Backend("cpu", forward, packed.logits, CpuSampler(sampler).sample)
