"""Draws one id per row of logits: mask, bias, temperature, top-k, top-p, min-p, inverse CDF.

Three launches whatever the rows ask for. The first two are spread over slices of the vocabulary:
best id and whether all is finite; then how many ids, and how much weight, lie within certain
distances of the best. The third is one program per row. Rows without top-k and top-p find the slice
and in it the id. The others rank without sorting: the ids that can matter are listed in order (or,
where they are too many, the row itself is read again and again), and cuts and draw are found by
bisection over scores, ties by id, as a stable sort would have them.

Weights are float32, relative to the best id's 1, and their sums float64, so a draw differs from
`runner.sampler.Sampler` only where a number falls within about 1e-6 of a boundary.

logits are float32 [S, V] with contiguous rows, V at most MAX_VOCAB; all else as in
`reference_sampling.draw`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momaserve.kernels.triton import sampling_kernels
from momaserve.kernels.triton.jit import ceil_div, power_of_2
from momaserve.kernels.triton.routing import check

MAX_VOCAB = 1 << 20
SLICE = 2048
"""Ids of one program of the first launches."""
LISTED = 4096
"""Ids that are ranked from a list; also how many the last launch reads at once."""
DRAW_WARPS = 16
DISTANCES = 8
"""Distances from the best that are counted: 2, 4, ... in units of the temperature, then all."""


def draw(
    logits: Tensor,
    masks: Tensor,
    choices: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
    *,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference_sampling.draw`; nothing waits for the device.

    Raises:
        ValueError: shapes or number formats that do not fit together; more than MAX_VOCAB ids.
    """
    num_rows, size = logits.shape
    if not 1 <= size <= MAX_VOCAB:
        raise ValueError(f"logits must have between 1 and {MAX_VOCAB} columns, got {size}")
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be float32 with contiguous rows, got {logits.dtype} with strides "
            f"{logits.stride()}"
        )
    if masks.dtype != torch.bool or masks.shape[1] != size or masks.stride(1) != 1:
        raise ValueError(
            f"masks must be bool [C, {size}] with contiguous rows, got {masks.dtype} "
            f"{list(masks.shape)} with strides {masks.stride()}"
        )
    for name, tensor, dtype in (
        ("choices", choices, torch.int32),
        ("temperature", temperature, torch.float64),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float64),
        ("min_p", min_p, torch.float64),
        ("uniforms", uniforms, torch.float64),
    ):
        check(name, tensor, (num_rows,), dtype)
    if bias is not None:
        check("bias", bias, (num_rows, size), torch.float32)
    token_ids = logits.new_empty(num_rows, dtype=torch.int64)
    is_finite = logits.new_empty(num_rows, dtype=torch.bool)
    if not num_rows:
        return token_ids, is_finite
    num_slices = ceil_div(size, SLICE)
    grid = (num_rows, num_slices)
    bests = logits.new_empty(2, *grid)
    best_ids = logits.new_empty(2, *grid, dtype=torch.int32)
    finites = logits.new_empty(grid, dtype=torch.int8)
    counts = logits.new_empty(num_rows, DISTANCES, num_slices, dtype=torch.int32)
    sums = logits.new_empty(num_rows, DISTANCES, num_slices, dtype=torch.float64)
    listed = logits.new_empty(3, num_rows, LISTED, dtype=torch.int32)
    flags = masks.view(torch.int8)
    strides = (logits.stride(0), masks.stride(0))
    what = (logits, bias, flags, choices)
    how = (temperature, top_k, top_p, min_p)
    sampling_kernels.survey[grid](
        *what, bests, best_ids, finites, *strides, size, SLICE=SLICE, num_warps=4
    )
    sampling_kernels.weigh[grid](
        *what,
        *how,
        bests,
        best_ids,
        counts,
        sums,
        *strides,
        size,
        SLICE=SLICE,
        PAD=power_of_2(num_slices),
        DISTANCES=DISTANCES,
        num_warps=4,
    )
    sampling_kernels.draw[(num_rows,)](
        *what,
        *how,
        uniforms,
        bests,
        best_ids,
        finites,
        counts,
        sums,
        listed[0],
        listed[1].view(torch.float32),
        listed[2],
        token_ids,
        is_finite.view(torch.int8),
        *strides,
        num_slices,
        size,
        SLICE=SLICE,
        PAD=power_of_2(num_slices),
        DISTANCES=DISTANCES,
        LISTED=LISTED,
        num_warps=DRAW_WARPS,
    )
    return token_ids, is_finite
