"""What this GPU can do at best: reading its memory, and a large product in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from momaserve_bench.gpu.device import Device, time_on

_COLUMNS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofs:
    read_bytes_per_s: float
    gemm_flops_per_s: float

    @classmethod
    def measure(
        cls, device: Device, *, buffer_bytes: int, gemm_size: int, num_runs: int, dtype: torch.dtype
    ) -> Roofs:
        """Reading is the quicker of a sum and a matrix-vector product over a buffer well beyond all
        caches; multiplying is a product of two square matrices of random numbers. Medians."""
        return cls(
            read_bytes_per_s=_measure_read(device, buffer_bytes, num_runs),
            gemm_flops_per_s=_measure_gemm(device, gemm_size, num_runs, dtype),
        )


def _measure_read(device: Device, buffer_bytes: int, num_runs: int) -> float:
    where = device.torch_device
    buffer = torch.ones(buffer_bytes // (4 * _COLUMNS), _COLUMNS, device=where)
    vector = torch.ones(_COLUMNS, device=where)
    reads = (partial(torch.sum, buffer), partial(torch.mv, buffer, vector))
    times = [time_on(device, read, num_runs=num_runs, num_warmup=2, inner=2) for read in reads]
    return buffer.nbytes / min(one.median_s for one in times)


def _measure_gemm(device: Device, size: int, num_runs: int, dtype: torch.dtype) -> float:
    # Random numbers: a product of equal ones draws less power, so clocks are higher.
    a, b = (torch.randn(size, size, device=device.torch_device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    work = partial(torch.mm, a, b, out=out)
    times = time_on(device, work, num_runs=num_runs, num_warmup=3, inner=4)
    return 2 * size**3 / times.median_s
