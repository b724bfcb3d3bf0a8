"""Where the time of one decoding step goes: host, device, and the kernels that take most of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import torch

from momaserve.core.plan import StepPlan
from momaserve.loading import ModelParts
from momaserve.request import Request
from momaserve.runner.backends import Backend, lay_out_step, select_backend
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.runner import Runner, RunningStep
from momaserve.runner.sampler import Sampler, SampleRow
from momaserve.sampling import Distribution
from momaserve.tokens.grammar import Choices
from momaserve_bench.gpu.device import Device, KernelTime, time_on
from momaserve_bench.gpu.inputs import Inputs
from momaserve_bench.gpu.steps import Sequences, decoding

_SHOWN = 12
"""Kernels that a report names."""


class StepBench:
    """Decoding steps of a model as the engine's runner starts them, without scheduler and requests'
    bookkeeping. Gives up the model's weights as the engine does."""

    def __init__(
        self,
        device: Device,
        parts: ModelParts,
        backend: str,
        *,
        num_rows: int,
        context: int,
        seed: int,
    ) -> None:
        """
        Args:
            num_rows: most rows of a step; KV memory is made for them.
            context: tokens that each row sees, itself included.
        """
        config = parts.model.config
        self._device, self._config, self._context, self._seed = device, config, context, seed
        sequences, _ = self._decoding("text", num_rows)
        self._storage: KVStorage = sequences.storage(parts.dtype, parts.device)
        sampler = Sampler(parts.processor.spec, parts.device)
        self._backend: Backend = select_backend(
            backend, parts.model, self._storage, sampler, keep_weights=False
        )
        self._runner = Runner(config, self._backend, self._storage)

    def _decoding(self, kind: str, num_rows: int) -> tuple[Sequences, StepPlan]:
        device = self._device.torch_device
        inputs = Inputs(self._seed, f"{kind} {num_rows}", device, torch.float32)
        return decoding(inputs, self._config, kind, [self._context] * num_rows)

    @torch.inference_mode()
    def measure(
        self, kind: str, num_rows: int, *, num_runs: int, num_warmup: int
    ) -> dict[str, Any]:
        """Medians over `num_runs` steps of rows of one of `steps.KINDS`.

        `host_ms` is until the step is started, with the device idle before; `whole_ms` until its
        tokens are on the host. `forward_ms` is the device's time of the forward pass (a replayed
        graph), several of them back to back. `device_ms` is what the profiler saw run on the device
        in one step, head and sampling included; None where it sees nothing.
        """
        device = self._device
        sequences, plan = self._decoding(kind, num_rows)
        rows = {
            name: SampleRow(
                choices=Choices.IMAGE if self._draws(kind, number) else Choices.TEXT,
                distribution=Distribution(temperature=1.0),
                seed=number,
                position=self._context,
            )
            for number, name in enumerate(sequences.by_id)
        }
        start = partial(self._start, plan, sequences.by_id, rows)
        for _ in range(num_warmup):
            start().result()
        host: list[float] = []
        whole: list[float] = []
        for _ in range(num_runs):
            device.synchronize()
            begun = device.now()
            step = start()
            host.append(device.now() - begun)
            step.result()
            whole.append(device.now() - begun)
        batch, entries = lay_out_step(
            self._backend, plan, sequences.by_id, self._config, self._storage, None, {}, {}
        )
        forward = time_on(
            device,
            lambda: self._backend.forward(plan, batch, entries),
            num_runs=num_runs,
            num_warmup=num_warmup,
            inner=10,
        )
        kernels = device.kernel_times(lambda: start().result())
        return {
            "kind": kind,
            "batch_size": num_rows,
            "context": self._context,
            "host_ms": 1e3 * median(host),
            "whole_ms": 1e3 * median(whole),
            "forward_ms": 1e3 * forward.median_s,
            "device_ms": 1e3 * sum(one.seconds for one in kernels) if kernels else None,
            "num_kernels": sum(one.count for one in kernels),
            "kernels": [_described(one) for one in kernels[:_SHOWN]],
        }

    @staticmethod
    def _draws(kind: str, row: int) -> bool:
        return kind == "image" or (kind == "mixed" and row % 2 == 1)

    def _start(
        self, plan: StepPlan, requests: Mapping[str, Request], rows: Mapping[str, SampleRow]
    ) -> RunningStep:
        return self._runner.execute(plan, requests, rows, count_routing=False)


def _described(kernel: KernelTime) -> dict[str, Any]:
    return {"name": kernel.name[:60], "ms": 1e3 * kernel.seconds, "count": kernel.count}
