"""Who computes a step: compiled kernels, or plain torch. Chosen once, when the engine starts."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from momaserve.core.plan import StepPlan
from momaserve.errors import ConfigError
from momaserve.layers.batch import ForwardBatch
from momaserve.models.moma import MomaModel
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.paged_attention import PagedAttention
from momaserve.runner.sampler import Sampler, SampleRow
from momaserve.runner.step_entries import StepEntries

logger = logging.getLogger(__name__)

_CPU_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Backend:
    """The arithmetic of an engine."""

    name: str
    forward: Callable[[StepPlan, ForwardBatch, StepEntries | None], Tensor]
    """Final hidden states, normed, [T, D], of the step that the batch was built from; what its
    depth-routed layers take goes into the entries."""
    logits: Callable[[Tensor, range], Tensor]
    """Hidden states [S, D] -> float32 logits [S, len(ids)] of a range of ids."""
    sample: Callable[[Tensor, Sequence[SampleRow], int], tuple[Tensor, Tensor]]
    """As `Sampler.sample`."""


def select_backend(
    name: str, model: MomaModel, storage: KVStorage, sampler: Sampler, *, keep_weights: bool
) -> Backend:
    """The backend of this name; `auto` takes compiled kernels where there are some.

    Args:
        keep_weights: whether `model` must stay usable when a backend has packed its weights.

    Raises:
        ConfigError: the backend cannot run here, for the reason that is named.
    """
    obstacle = _obstacle_to_cpu(storage)
    if name == "cpu" and obstacle is not None:
        raise ConfigError(f"backend cpu cannot be used: {obstacle}")
    if name == "reference" or obstacle is not None:
        if name == "auto":
            logger.info("backend reference (plain torch), since %s", obstacle)
        return reference_backend(model, storage, sampler)
    threads = torch.get_num_threads()
    logger.info("backend cpu: compiled kernels, %d thread%s", threads, "s"[: threads > 1])
    # numba is optional, and takes a moment to load.
    module = importlib.import_module("momaserve.runner.cpu_backend")
    backend: Backend = module.cpu_backend(model, storage, sampler, keep_weights=keep_weights)
    return backend


def reference_backend(model: MomaModel, storage: KVStorage, sampler: Sampler) -> Backend:
    """Plain torch, on any device: the oracle of the others."""

    def forward(plan: StepPlan, batch: ForwardBatch, entries: StepEntries | None) -> Tensor:
        hidden: Tensor = model(replace(batch, attention=PagedAttention(plan, storage, entries)))
        return hidden

    return Backend("reference", forward, model.logits, sampler.sample)


def _obstacle_to_cpu(storage: KVStorage) -> str | None:
    """Why the compiled CPU kernels cannot be used, or None."""
    if storage.k.device.type != "cpu":
        return f"the model is on {storage.k.device.type}"
    if storage.k.dtype not in _CPU_DTYPES:
        return f"it has no kernels for {storage.k.dtype}"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'momaserve[cpu]')"
    return None
