"""Single numbers inside kernels: bfloat16 there and back, and an exponential that vectorises."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

LOWEST_EXP = np.float32(-87.0)
HIGHEST_EXP = np.float32(88.0)
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_C5 = np.float32(1.9875691500e-4)
_C4 = np.float32(1.3981999507e-3)
_C3 = np.float32(8.3334519073e-3)
_C2 = np.float32(4.1665795894e-2)
_C1 = np.float32(1.6666665459e-1)
_C0 = np.float32(5.0000001201e-1)
_ONE = np.float32(1.0)
_HALF = np.float32(0.5)


def widen(value: Any) -> Any:
    """float32 of a weight: float32 as it is, uint16 as the upper half of one. In kernels only."""
    raise NotImplementedError


# numba compares the names of arguments and their annotations, which lambdas cannot have.
@overload(widen, inline="always")
def _widen(value):  # type: ignore[no-untyped-def]
    if isinstance(value, types.Integer):
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def narrow(value: Any, like: Any) -> Any:
    """float32 as an element of the array `like`: itself, or rounded to bfloat16 (nearest even)."""
    raise NotImplementedError


@overload(narrow, inline="always")
def _narrow(value, like):  # type: ignore[no-untyped-def]
    if isinstance(like.dtype, types.Integer):

        def rounded(value, like):  # type: ignore[no-untyped-def]
            bits = np.float32(value).view(np.uint32)
            if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
                return np.uint16(0x7FC0)  # NaN, which rounding could make infinite
            odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
            return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

        return rounded
    return lambda value, like: value


@register_jitable(inline="always")
def exp32(x: Any) -> Any:
    """e^x within 3e-7 of itself for x in [-87, 88], and their values beyond (Cephes' expf)."""
    x = min(max(x, LOWEST_EXP), HIGHEST_EXP)
    n = np.floor(x * _LOG2_E + _HALF)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_C5 * r + _C4) * r + _C3) * r + _C2) * r + _C1) * r + _C0
    y = p * r * r + r + _ONE
    scale = np.int32(np.int32(np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return y * scale


@register_jitable(inline="always")
def sigmoid(x: Any) -> Any:
    return _ONE / (_ONE + exp32(-x))
