"""The backend of compiled CPU kernels. Needs numba.

Kernels are compiled when the first engine of a machine starts, and kept on disk.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from functools import partial

import numba
import torch
from torch import Tensor

from momaserve.core.plan import OWN, PlannedSequence, StepPlan
from momaserve.layers.batch import POLICY_CODES, ForwardBatch, RoutingPlan
from momaserve.modality import Modality
from momaserve.models.moma import MomaModel
from momaserve.runner.backends import Backend
from momaserve.runner.block_attention import BlockAttention, BlockMemory
from momaserve.runner.cpu_model import CpuModel
from momaserve.runner.cpu_sampler import CpuSampler
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.sampler import Sampler, SampleRow
from momaserve.runner.step_entries import StepEntries
from momaserve.sampling import Distribution
from momaserve.tokens.grammar import Choices

logger = logging.getLogger(__name__)


def cpu_backend(
    model: MomaModel, storage: KVStorage, sampler: Sampler, *, keep_weights: bool
) -> Backend:
    """Packs the weights of `model`, and gives up its own unless they are to be kept."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    num_threads = min(torch.get_num_threads(), most)
    packed = CpuModel(model, threads=num_threads > 1, keep_weights=keep_weights)
    _return_freed_memory()
    cpu_sampler = CpuSampler(sampler)

    def forward_in(
        memory: BlockMemory, plan: StepPlan, batch: ForwardBatch, entries: StepEntries | None
    ) -> Tensor:
        numba.set_num_threads(num_threads)  # of the thread that asks, whichever it is
        return packed.forward(batch, BlockAttention(plan, memory, entries, num_threads))

    started = time.monotonic()
    small = _small_storage(model, storage)
    hidden = _rehearse(partial(forward_in, BlockMemory(small)), small, model)
    cpu_sampler.sample(packed.logits(hidden, range(model.config.vocab_size)), [_ANY_ROW])
    logger.info("compiled kernels loaded in %.1f s", time.monotonic() - started)
    forward = partial(forward_in, BlockMemory(storage))
    return Backend("cpu", forward, packed.logits, cpu_sampler.sample)


def _return_freed_memory() -> None:
    """Packing frees matrices of all sizes, many of which the C library would keep for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


_ANY_ROW = SampleRow(choices=Choices.TEXT, distribution=Distribution(), seed=0, position=0)


def _small_storage(model: MomaModel, like: KVStorage) -> KVStorage:
    """Two tokens, and all that depth-routed layers may keep of them."""
    num_layers = model.config.num_hidden_layers
    return KVStorage(
        model.config,
        num_blocks=1 + num_layers,
        block_size=2,
        dtype=like.k.dtype,
        device=like.k.device,
    )


@torch.inference_mode()
def _rehearse(
    forward: Callable[[StepPlan, ForwardBatch, StepEntries | None], Tensor],
    storage: KVStorage,
    model: MomaModel,
) -> Tensor:
    """Runs a step of two tokens, so that every kernel is there before the first request.

    Returns:
        Hidden states of the last token, [1, D].
    """
    image = model.config.image
    ids = [model.config.bos_token_id, model.config.eos_token_id]
    kinds = [Modality.TEXT, Modality.TEXT]
    if image is not None:
        ids[1], kinds[1] = image.first_token_id, Modality.IMAGE
    policy = next(policy for policy in POLICY_CODES if model.missing_for(policy) is None)
    batch = ForwardBatch(
        token_ids=torch.tensor(ids),
        positions=torch.tensor([0, 1]),
        modality=torch.tensor([int(kind) for kind in kinds], dtype=torch.int8),
        modalities=frozenset(kinds),
        routing=RoutingPlan(
            policies=frozenset({policy}),
            policy=torch.full((2,), POLICY_CODES[policy], dtype=torch.int8),
            segments=torch.full((2,), -1),
            num_segments=0,
        ),
    )
    num_routed = len(storage.layout.routed)
    sequence = PlannedSequence(
        "rehearsal",
        OWN,
        0,
        2,
        blocks=(0,),
        entry_blocks=range(1, 1 + num_routed),
        max_num_entries=2 * num_routed,
    )
    plan = StepPlan(sequences=(sequence,), num_tokens=2)
    entries = StepEntries(plan, storage, {}) if num_routed else None
    return forward(plan, batch, entries)[1:]
