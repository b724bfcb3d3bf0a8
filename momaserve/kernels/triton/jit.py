"""What the other rooms use of Triton, so that its untyped names are brought in here alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

__all__ = ["ceil_div", "coarse", "kernel", "kernel_for_any", "power_of_2", "tl"]


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled on its first launch for each set of types and constants."""
    return triton.jit(function)


def kernel_for_any(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """The same, but not anew when these integers change to or from 1 or a multiple of 16.

    For what differs from step to step or from layer to layer: a compilation takes a second.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=list(names))

    return decorate


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def coarse(n: int) -> int:
    """A power of two of at least n, out of few: for constants that grow with a step."""
    return next((size for size in (16, 256) if size >= n), power_of_2(n))


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()
