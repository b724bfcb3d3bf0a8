"""How kernels are compiled: nothing that would break infinities and NaN, without the
interpreter's lock, and kept on disk so that the next start is quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])

FAST_MATH = frozenset({"contract", "reassoc", "nsz", "arcp"})
"""Sums may be reordered and fused, as for vector units. Not "ninf" and "nnan": a request whose
numbers are not finite must stay recognisable."""


def kernel(function: Function) -> Function:
    """Compiled on its first call, for the types that it is called with."""
    return _compiled(function, parallel=False)


def threaded(function: Function) -> Function:
    """The same; its loops over `prange` are shared among threads."""
    return _compiled(function, parallel=True)


def _compiled(function: Function, *, parallel: bool) -> Function:
    options: dict[str, Any] = {"nogil": True, "fastmath": set(FAST_MATH), "parallel": parallel}
    try:
        return cast(Function, njit(cache=True, **options)(function))
    except RuntimeError:  # no folder to write to: compile anew at each start
        return cast(Function, njit(**options)(function))
