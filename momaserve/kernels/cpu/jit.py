"""How kernels are compiled: nothing that would break infinities and NaN, without the
interpreter's lock, and kept on disk so that the next start is quick."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])

_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()[:12]
"""Stands for what all kernels are made of. numba's cache on disk knows a kernel by its name and the
date of its own file, and would not notice a change of another file that it is built from."""
FAST_MATH = frozenset({"contract", "reassoc", "nsz", "arcp"})
"""Sums may be reordered and fused, as for vector units. Not "ninf" and "nnan": a request whose
numbers are not finite must stay recognisable."""


def kernel(function: Function) -> Function:
    """Compiled on its first call, for the types that it is called with."""
    return _compiled(_renamed(function, function.__name__), parallel=False)


def threaded(function: Function) -> Function:
    """The same; its loops over `prange` are shared among threads."""
    return _compiled(_renamed(function, f"{function.__name__}_threaded"), parallel=True)


def _renamed(function: Function, name: str) -> Function:
    """The same function by another name, with `_SOURCES` behind it.

    numba's cache on disk tells functions apart by their names, not by how they are compiled: of two
    kernels of one name, whichever is compiled first would be both.
    """
    assert isinstance(function, FunctionType)
    name = f"{name}_{_SOURCES}"
    twin = FunctionType(function.__code__, function.__globals__, name)
    twin.__module__, twin.__qualname__, twin.__doc__ = function.__module__, name, function.__doc__
    return cast(Function, twin)


def _compiled(function: Function, *, parallel: bool) -> Function:
    options: dict[str, Any] = {"nogil": True, "fastmath": set(FAST_MATH), "parallel": parallel}
    try:
        return cast(Function, njit(cache=True, **options)(function))
    except RuntimeError:  # no folder to write to: compile anew at each start
        return cast(Function, njit(**options)(function))
