"""Where the kernels of this folder run, and in which number formats they are tried there."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = [torch.float32, torch.float16]
"""The interpreter's products of bfloat16 are wrong, so that format is tried on a GPU alone."""
if DEVICE == "cuda":
    DTYPES.append(torch.bfloat16)

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Of results near 1: a few units in the last place of the format."""
if DEVICE == "cuda":
    TOLERANCE[torch.float32] = 1e-4  # attention takes three TF32 products for one of float32


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def randint(low: int, high: int, *shape: int, seed: int) -> Tensor:
    """int32, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(DEVICE, torch.int32)


def assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Within the tolerance of a computation in `dtype`; both finite."""
    assert got.shape == wanted.shape
    assert bool(torch.isfinite(got).all())
    tolerance = factor * TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)
