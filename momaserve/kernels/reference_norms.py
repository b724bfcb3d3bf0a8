"""RMSNorm with the residual of either block order, in plain torch: twins of `triton.norms`."""

from __future__ import annotations

import torch
from torch import Tensor

from momaserve.kernels import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """rmsnorm(x) * weight: [T, D]."""
    return _stored(reference.rms_norm(x.float(), weight, eps), x, out)


def add_normed(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """x + rmsnorm(y) * weight, the residual of post order: [T, D]."""
    return _stored(x.float() + reference.rms_norm(y.float(), weight, eps), x, out)


def normed_sum(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out_sum: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + y and rmsnorm(x + y) * weight, the residual of pre order: both [T, D]."""
    total = _stored(x.float() + y.float(), x, out_sum)
    return total, _stored(reference.rms_norm(total.float(), weight, eps), x, out)


def _stored(result: Tensor, like: Tensor, out: Tensor | None) -> Tensor:
    """`result` in `out`, or in a new tensor of the dtype of `like`."""
    return (torch.empty_like(like) if out is None else out).copy_(result)
