"""RMSNorm, alone and with the residual of either block order: one program per row.

x, y and the outputs are [T, D], rows anywhere; weight is [D]. Every tensor has a number format of
its own (experts hand over float32 sums), statistics are float32. Rows know nothing of each other,
so padding rows come out finite if they went in so. Outputs may be the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momaserve.kernels.triton.checks import check_shape
from momaserve.kernels.triton.jit import kernel, power_of_2, tl

MAX_WIDTH = 16384
"""A row is held in registers."""


def warps_for(width: int) -> int:
    """Eight numbers for each thread: one load of 16 bytes."""
    return max(1, min(16, power_of_2(width) // 256))


@kernel
def _rms_norm(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out = rmsnorm(x); grid [T]; strides in elements."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    wide = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    normed = (wide * scale * gain).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, normed, mask=inside)


@kernel
def _add_normed(
    x: tl.tensor,
    y: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out = x + rmsnorm(y); grid [T]; strides in elements."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    wide = tl.load(y + row * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    base = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    total = (base + wide * scale * gain).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, total, mask=inside)


@kernel
def _normed_sum(
    x: tl.tensor,
    y: tl.tensor,
    weight: tl.tensor,
    out_sum: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    sum_stride: tl.tensor,
    out_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out_sum = x + y, out = rmsnorm(out_sum); grid [T]; strides in elements."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    base = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(y + row * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    stored = (base + added).to(out_sum.dtype.element_ty)
    tl.store(out_sum + row * sum_stride + columns, stored, mask=inside)
    # The norm of what the residual stream holds, rounding included.
    wide = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    normed = (wide * scale * gain).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + columns, normed, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """rmsnorm(x) * weight: [T, D], in x's dtype unless `out` has another.

    Raises:
        ValueError: shapes that do not fit.
    """
    out = torch.empty_like(x) if out is None else out
    _check(weight, x=x, out=out)
    if len(x):
        width = x.shape[1]
        _rms_norm[(len(x),)](
            x,
            weight,
            out,
            x.stride(0),
            out.stride(0),
            eps,
            WIDTH=width,
            BLOCK=power_of_2(width),
            num_warps=warps_for(width),
        )
    return out


def add_normed(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None
) -> Tensor:
    """x + rmsnorm(y) * weight, the residual of post order: [T, D], in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    out = torch.empty_like(x) if out is None else out
    _check(weight, x=x, y=y, out=out)
    if len(x):
        width = x.shape[1]
        _add_normed[(len(x),)](
            x,
            y,
            weight,
            out,
            x.stride(0),
            y.stride(0),
            out.stride(0),
            eps,
            WIDTH=width,
            BLOCK=power_of_2(width),
            num_warps=warps_for(width),
        )
    return out


def normed_sum(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out_sum: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x + y and rmsnorm(x + y) * weight, the residual of pre order: both [T, D], in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    out_sum = torch.empty_like(x) if out_sum is None else out_sum
    out = torch.empty_like(x) if out is None else out
    _check(weight, x=x, y=y, out_sum=out_sum, out=out)
    if len(x):
        width = x.shape[1]
        _normed_sum[(len(x),)](
            x,
            y,
            weight,
            out_sum,
            out,
            x.stride(0),
            y.stride(0),
            out_sum.stride(0),
            out.stride(0),
            eps,
            WIDTH=width,
            BLOCK=power_of_2(width),
            num_warps=warps_for(width),
        )
    return out_sum, out


def _check(weight: Tensor, **rows: Tensor) -> None:
    num_rows, width = rows["x"].shape
    if width > MAX_WIDTH:
        raise ValueError(f"rows of {width} numbers are wider than {MAX_WIDTH}")
    check_shape("weight", weight, (width,))
    for name, tensor in rows.items():
        check_shape(name, tensor, (num_rows, width))
