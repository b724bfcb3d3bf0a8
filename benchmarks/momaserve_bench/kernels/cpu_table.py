"""The cases of the compiled CPU kernels, by family. Needs numba."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numba

from momaserve_bench.kernels.case import Case, Sizes
from momaserve_bench.kernels.cpu_attention import attention_cases
from momaserve_bench.kernels.cpu_glue import glue_cases
from momaserve_bench.kernels.cpu_matrices import expert_cases, linear_cases
from momaserve_bench.kernels.cpu_routing import routing_cases
from momaserve_bench.kernels.cpu_sampling import sampling_cases

FAMILIES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "linear": linear_cases,
    "experts": expert_cases,
    "attention": attention_cases,
    "routing": routing_cases,
    "glue": glue_cases,
    "sampling": sampling_cases,
}


def cases(family: str, sizes: Sizes) -> Iterator[Case]:
    """Cases of a family; kernels called from this thread get `sizes.threads` threads."""
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(sizes.threads, most))
    return FAMILIES[family](sizes)
