"""Whole steps of shallow models: Triton against plain torch, graphs against launches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from momaserve.config import RoutingPolicy
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.random_weights import random_model
from momaserve.runner.backends import reference_backend, select_backend
from momaserve.runner.gpu_model import GpuModel
from momaserve.runner.gpu_step import StepLayout
from momaserve.runner.sampler import Sampler
from momaserve.runner.triton_backend import GraphCache
from momaserve.tokens.grammar import GrammarSpec
from momaserve_bench.gpu.findings import TOLERANCE, Check, error_of
from momaserve_bench.gpu.inputs import Inputs
from momaserve_bench.gpu.steps import (
    KINDS,
    Part,
    Sequences,
    StepOutput,
    decoding,
    make_request,
    random_ids,
    run_steps,
    shallow,
)

STEP_TOLERANCE = 1e-4
"""In float32, of the largest value. No kernel rounds a product of float32 to less (attention takes
three TF32 products, experts and routers none at all), so both sides differ by the order of sums of
some thousand products, about 1e-6 each, grown by two layers and their norms. Routing does not
amplify it: random weights route by the token's id alone, with cuts between ids."""
NARROW_RATIO = 2.0
"""In 16 bits: how much further than plain torch in the same format the kernels may be from plain
torch in float32, by the root of mean squares. Kernels keep sums in float32 where torch rounds them,
so less than 1 is expected; the exact ratio depends on where either rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """Of the models and steps."""

    configs: Mapping[str, ModelConfig]
    """Of the models, by name."""
    narrow_names: tuple[str, ...]
    """Those that are checked in 16 bits too."""
    narrow: torch.dtype
    chunks: tuple[int, int, int]
    """Prompt tokens of three requests."""
    contexts: tuple[int, ...]
    """Lengths of decoding sequences, for graphs."""


PRESETS = (
    "moma-1.4b-4t4i",
    "moma-1.4b-dense",
    "moma-1.4b-moe-8x",
    "moma-1.4b-1t1i",
    "moma-mod-2.3b-4t4i",
)
FULL = StepSizes(
    configs={name: shallow(name, 2) for name in PRESETS},
    narrow_names=("moma-1.4b-4t4i", "moma-mod-2.3b-4t4i"),
    narrow=torch.bfloat16,
    chunks=(37, 5, 301),
    contexts=(1, 33, 100, 17, 250),
)


def step_checks(seed: int, device: torch.device, sizes: StepSizes = FULL) -> Iterator[Check]:
    """Of each model in float32, then of some in 16 bits."""
    for name in sizes.configs:
        yield from _Maker(seed, device, torch.float32, name, sizes).checks()
    for name in sizes.narrow_names:
        yield from _Maker(seed, device, sizes.narrow, name, sizes).checks()


class _Maker:
    """Checks of one model in one number format; made when the first of them is run."""

    def __init__(
        self, seed: int, device: torch.device, dtype: torch.dtype, name: str, sizes: StepSizes
    ) -> None:
        self._seed, self._device, self._dtype = seed, device, dtype
        self._name, self._sizes = name, sizes
        self._config = sizes.configs[name]
        self._graph_tolerance = TOLERANCE[dtype] / 10  # the same kernels on the same numbers
        self._model = cache(self._make_model)

    def checks(self) -> Iterator[Check]:
        is_wide = self._dtype is torch.float32
        name = f"{self._name}, {str(self._dtype).removeprefix('torch.')}"
        tolerance = STEP_TOLERANCE if is_wide else NARROW_RATIO
        what = name if is_wide else f"{name}: error over plain torch's"
        yield Check("whole step", what, tolerance, self._steps if is_wide else self._narrow_steps)
        for kind in KINDS:
            error = partial(self._graph, kind)
            yield Check("graph = launches", f"{name}: rows of {kind}", self._graph_tolerance, error)

    def _make_model(self) -> MomaModel:
        return random_model(
            self._config, seed=self._seed % (1 << 31), dtype=self._dtype, device=self._device
        )

    def _inputs(self, name: str) -> Inputs:
        return Inputs(self._seed, f"{self._name} {name}", self._device, self._dtype)

    def _run(self, model: MomaModel, backend: str) -> list[StepOutput]:
        """Chunks of three requests under three policies; chunk and decode; decode."""
        first, second, third = self._sizes.chunks
        inputs = self._inputs("steps")
        requests = []
        for number, (count, routing, prompt_routing) in enumerate(
            (
                (first, RoutingPolicy.CAUSAL, None),
                (second, RoutingPolicy.CALIBRATED, None),
                (third, RoutingPolicy.THRESHOLD, RoutingPolicy.EXPERT_CHOICE),
            )
        ):
            kinds = [Modality(kind) for kind in inputs.integers(0, 2, count + 8).tolist()]
            ids = random_ids(inputs, self._config, kinds)
            requests.append(make_request(f"r{number}", ids, count, routing, prompt_routing))
        sequences = Sequences(self._config, requests, max(self._sizes.chunks) + 8)
        steps = (
            (Part(0, 0, first - 1), Part(1, 0, second), Part(2, 0, third)),
            (Part(0, first - 1, 3), Part(1, second, 1), Part(2, third, 1)),
            (Part(0, first + 2, 1), Part(1, second + 1, 1), Part(2, third + 1, 1)),
        )
        dtype = model.embed_tokens.dtype
        storage = sequences.storage(dtype, self._device)
        sampler = Sampler(GrammarSpec.from_config(self._config), self._device)
        if backend == "reference":
            with sdpa_kernel(SDPBackend.MATH):
                chosen = reference_backend(model, storage, sampler)
                return run_steps(chosen, sequences, storage, steps)
        chosen = select_backend("triton", model, storage, sampler, keep_weights=True)
        return run_steps(chosen, sequences, storage, steps)

    def _steps(self) -> float:
        model = self._model()
        wanted, got = self._run(model, "reference"), self._run(model, "triton")
        if any(one.counts != other.counts for one, other in zip(got, wanted, strict=True)):
            return math.inf
        return max(
            error_of(mine, other)
            for one, two in zip(got, wanted, strict=True)
            for mine, other in ((one.hidden, two.hidden), (one.logits, two.logits))
        )

    def _narrow_steps(self) -> float:
        model = self._model()
        wide = deepcopy(model).float()
        wanted = self._run(wide, "reference")
        del wide
        found = [self._run(model, backend) for backend in ("triton", "reference")]
        if any(one.counts != other.counts for one, other in zip(found[0], wanted, strict=True)):
            return math.inf
        ours, torchs = (_distance(outputs, wanted) for outputs in found)
        return ours / max(torchs, 1e-9)

    def _graph(self, kind: str) -> float:
        """The second run of a shape replays what the first, of other rows, captured."""
        inputs = self._inputs(f"graph {kind}")
        sequences, plan = decoding(inputs, self._config, kind, self._sizes.contexts)
        others, other_plan = decoding(inputs, self._config, "mixed", self._sizes.contexts)
        storage = sequences.storage(self._dtype, self._device)
        for memory in (storage.k, storage.v):
            memory.copy_(inputs.normal(*memory.shape))
        laid_out = GpuModel(self._model(), storage, keep_weights=True)
        graphs = GraphCache(laid_out.forward, self._device)
        layout = StepLayout(self._config, storage)
        captured, _ = layout(other_plan, others.by_id, None, {}, {})
        graphs.run(captured.buffers)
        if self._device.type == "cuda" and not graphs.num_captured:
            return math.inf  # nothing to compare: its log says why
        batch, _ = layout(plan, sequences.by_id, None, {}, {})
        launched = laid_out.forward(batch.buffers).clone()
        batch, _ = layout(plan, sequences.by_id, None, {}, {})
        return error_of(graphs.run(batch.buffers), launched)


def _distance(outputs: list[StepOutput], wanted: list[StepOutput]) -> float:
    """Root of the mean squared difference of hidden states, over that of what was wanted."""

    def total(tensors: list[Tensor]) -> float:
        return sum(float(tensor.double().square().sum()) for tensor in tensors)

    differences = [
        one.hidden.float() - two.hidden for one, two in zip(outputs, wanted, strict=True)
    ]
    return math.sqrt(total(differences) / total([one.hidden for one in wanted]))
