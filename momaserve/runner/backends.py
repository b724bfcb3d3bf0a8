"""Who computes a step: compiled kernels, or plain torch. Chosen once, when the engine starts."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from momaserve.core.plan import StepPlan
from momaserve.errors import ConfigError
from momaserve.layers.batch import ForwardBatch, RoutingObserver
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.request import Request
from momaserve.runner.inputs import build_batch
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.paged_attention import PagedAttention
from momaserve.runner.sampler import Sampler, SampleRow
from momaserve.runner.step_entries import StepEntries
from momaserve.runner.xformers_attention import obstacle_to as obstacle_to_pages

logger = logging.getLogger(__name__)

_CPU_DTYPES = (torch.float32, torch.bfloat16)
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_CAPABILITY = (8, 0)
"""Of the devices that Triton kernels, ours and those of xformers, are compiled for."""


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
    lay_out: LayOut | None = None
    """How it wants a step's inputs; None is `build_batch` and `StepEntries`."""


class LayOut(Protocol):
    """Makes a step's inputs, where a backend reads them from tensors of its own."""

    def __call__(
        self,
        plan: StepPlan,
        requests: Mapping[str, Request],
        observer: RoutingObserver | None,
        sampling: Mapping[str, Tensor],
        before: Mapping[tuple[str, int], Tensor],
    ) -> tuple[ForwardBatch, StepEntries | None]:
        """`sampling` and `before` as those of `build_batch` and `StepEntries`."""
        ...


def lay_out_step(
    backend: Backend,
    plan: StepPlan,
    requests: Mapping[str, Request],
    config: ModelConfig,
    storage: KVStorage,
    observer: RoutingObserver | None,
    sampling: Mapping[str, Tensor],
    before: Mapping[tuple[str, int], Tensor],
) -> tuple[ForwardBatch, StepEntries | None]:
    """What the backend's `forward` is given for a step.

    Args:
        sampling, before: of the step in flight, as for `build_batch` and `StepEntries`.
    """
    if backend.lay_out is not None:
        return backend.lay_out(plan, requests, observer, sampling, before)
    batch = build_batch(plan, requests, config, storage.k.device, observer, sampling)
    return batch, StepEntries(plan, storage, before) if storage.layout.routed else None


def select_backend(
    name: str, model: MomaModel, storage: KVStorage, sampler: Sampler, *, keep_weights: bool
) -> Backend:
    """The backend of this name; `auto` takes compiled kernels of ours where there are some.

    Args:
        keep_weights: whether `model` must stay usable when a backend has packed its weights.

    Raises:
        ConfigError: the backend cannot run here, for the reason that is named.
    """
    wanted = name
    if name == "auto":
        wanted = "triton" if storage.k.device.type == "cuda" else "cpu"
    if wanted == "reference":
        return reference_backend(model, storage, sampler)
    obstacle = _OBSTACLES[wanted](model.config, storage)
    if obstacle is not None:
        if name != "auto":
            raise ConfigError(f"backend {name} cannot be used: {obstacle}")
        logger.info("backend reference (plain torch), since %s", obstacle)
        return reference_backend(model, storage, sampler)
    if wanted == "cpu":
        threads = torch.get_num_threads()
        logger.info("backend cpu: compiled kernels, %d thread%s", threads, "s"[: threads > 1])
    elif wanted == "triton":
        logger.info("backend triton: compiled kernels, CUDA graphs for decoding steps")
    else:
        logger.info("backend xformers: plain torch, and the paged attention of xformers")
    # What brings or compiles the kernels is optional, and takes a moment to load.
    module = importlib.import_module(f"momaserve.runner.{wanted}_backend")
    make = getattr(module, f"{wanted}_backend")
    backend: Backend = make(model, storage, sampler, keep_weights=keep_weights)
    return backend


def reference_backend(model: MomaModel, storage: KVStorage, sampler: Sampler) -> Backend:
    """Plain torch, on any device: the oracle of the others."""

    def forward(plan: StepPlan, batch: ForwardBatch, entries: StepEntries | None) -> Tensor:
        hidden: Tensor = model(replace(batch, attention=PagedAttention(plan, storage, entries)))
        return hidden

    return Backend("reference", forward, model.logits, sampler.sample)


def _obstacle_to_cpu(config: ModelConfig, storage: KVStorage) -> str | None:
    """Why the compiled CPU kernels cannot be used, or None."""
    if storage.k.device.type != "cpu":
        return f"the model is on {storage.k.device.type}"
    if storage.k.dtype not in _CPU_DTYPES:
        return f"it has no kernels for {storage.k.dtype}"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'momaserve[cpu]')"
    return None


def _obstacle_to_triton(config: ModelConfig, storage: KVStorage) -> str | None:
    """Why the Triton kernels cannot be used, or None."""
    device, dtype = storage.k.device, storage.k.dtype
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'momaserve[gpu]')"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "the model is on cpu, where its kernels run under TRITON_INTERPRET=1 alone"
        if dtype is torch.bfloat16:
            return f"its interpreter has no products of {dtype}"
    elif (unfit := _unfit(device)) is not None:
        return unfit
    if dtype not in _TRITON_DTYPES:
        return f"it has no kernels for {dtype}"
    module = importlib.import_module("momaserve.runner.triton_backend")
    obstacle: str | None = module.obstacle_to(config)
    return obstacle


def _obstacle_to_xformers(config: ModelConfig, storage: KVStorage) -> str | None:
    """Why xformers cannot compute attention, or None."""
    for package in ("xformers", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install 'momaserve[xformers]')"
    obstacle = _unfit(storage.k.device) or obstacle_to_pages(
        config.head_dim, storage.k.dtype, storage.layout.block_size
    )
    if obstacle is not None:
        return obstacle
    try:
        module = importlib.import_module("momaserve.runner.xformers_backend")
    except (ImportError, OSError) as error:  # it refuses some versions of other packages
        return f"xformers cannot be loaded: {error}"
    found: str | None = module.obstacle_to(config, storage)
    return found


def _unfit(device: torch.device) -> str | None:
    """Why kernels for NVIDIA GPUs do not run on the device, or None."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        here, least = (".".join(map(str, version)) for version in (capability, _LEAST_CAPABILITY))
        return f"the device has compute capability {here}, less than {least}"
    return None


_OBSTACLES = {
    "cpu": _obstacle_to_cpu,
    "triton": _obstacle_to_triton,
    "xformers": _obstacle_to_xformers,
}
