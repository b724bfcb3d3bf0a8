"""What one measurement of a kernel is made of: who computes, from what, and what is right.

Knows no backend: the tables of cases build these, `timing` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from momaserve.models.config import ModelConfig

KERNEL = "kernel"
"""Name of the contender that is ours; all others are torch's."""

EXACT = 0.0
FLOAT32 = 1e-4
"""Largest difference over the largest value: sums of thousands of float32 in another order."""
BFLOAT16 = 3e-2
"""The same where inputs, outputs and what lies between are rounded to 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the tables of cases are asked for."""

    config: ModelConfig
    dtype: torch.dtype
    """Of weights and K/V: float32 or bfloat16."""
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    threads: int
    seed: int

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def is_half(self) -> bool:
        return self.dtype is torch.bfloat16

    @property
    def is_threaded(self) -> bool:
        return self.threads > 1

    def generator(self) -> torch.Generator:
        """Draws the same numbers each time that it is made."""
        return torch.Generator().manual_seed(self.seed)


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Ready:
    """A contender with weights of its own, ready to be called again and again."""

    run: Callable[[], Tensor]
    """Computes; the result may be overwritten by the next call."""
    prepare: Callable[[], None] = _nothing
    """Restores what `run` changes. Called before each run, not timed."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute a case."""

    name: str
    make: Callable[[], Ready]
    """Each call copies the weights, so that no two share a cache line."""
    tolerance: float
    """The largest error that is no mistake."""


@dataclass(frozen=True, slots=True)
class Contest:
    """The kernel, its twin and other ways of torch, and the judge of their results."""

    contenders: tuple[Contender, ...]
    """The kernel first."""
    error: Callable[[Tensor], float]
    """How wrong a result is; 0 is right, infinite or NaN cannot be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kernel on one shape. Light: nothing is allocated before `build`."""

    kernel: str
    """`module.function`, without the `_threaded` of its other form."""
    what: str
    """Which matrix or part of the model it stands for, with its shape."""
    rows: int
    context: int | None = None
    flops: float
    """Multiplications and additions; 0 for a kernel that moves, compares or draws."""
    num_bytes: float
    """What it must read and write at least: weights and K/V in their own format, each once,
    and float32 activations in and out."""
    state_bytes: int
    """Weights or K/V of all contenders together, one copy each; 0 for a kernel over activations
    alone, which are in caches when it runs, as they are in a step."""
    touched_bytes: int
    """What one turn reads or writes of it; less where experts or K/V are left out."""
    held_bytes: int
    """What `build` keeps besides, at most."""
    build: Callable[[], Contest]
    absent: tuple[str, ...] = ()
    """Ways of torch that this machine or this version lacks."""


def judge(wanted: Tensor) -> Callable[[Tensor], float]:
    """Error of a result: its largest difference from `wanted`, over the largest value there."""
    wide = wanted.double()
    largest = max(float(wide.abs().max()), 1e-30)

    def error(got: Tensor) -> float:
        if got.shape != wanted.shape:
            return float("inf")
        return float((got.double() - wide).abs().max()) / largest

    return error


def spread(generator: torch.Generator, *shape: int, inputs: int = 1) -> Tensor:
    """Normal float32 numbers, small enough that a product over `inputs` of them is near 1."""
    numbers: Tensor = torch.randn(*shape, generator=generator) * inputs**-0.5
    return numbers
