"""Cases of matrix products: packed matrices, and routed experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from momaserve.kernels import reference
from momaserve.kernels.cpu import experts, linear
from momaserve.models.config import ExpertGroupConfig
from momaserve_bench.kernels.case import (
    BFLOAT16,
    FLOAT32,
    KERNEL,
    Case,
    Contender,
    Contest,
    Ready,
    Sizes,
    judge,
    spread,
)


def linear_cases(sizes: Sizes) -> Iterator[Case]:
    """Projections of attention, and the head."""
    config = sizes.config
    width = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    hidden = config.hidden_size
    matrices = (
        ("qkv", width + 2 * keys, hidden),
        ("o", hidden, width),
        ("head", config.vocab_size, hidden),
    )
    for name, outputs, inputs in matrices:
        for rows in sizes.rows:
            yield _linear_case(sizes, name, outputs, inputs, rows)


def expert_cases(sizes: Sizes) -> Iterator[Case]:
    """Groups of experts, those of the same shape once."""
    shapes: dict[tuple[int, int], list[ExpertGroupConfig]] = {}
    for group in sizes.config.expert_groups:
        shapes.setdefault((group.num_experts, group.intermediate_size), []).append(group)
    for (count, inner), groups in shapes.items():
        name = "+".join(group.name for group in groups)
        for rows in sizes.rows:
            yield _experts_case(sizes, name, count, inner, rows)


# --- a packed matrix -----------------------------------------------------------------------


def onednn_pack(weight: Tensor, num_rows: int) -> Tensor:
    """A matrix [O, I] in the layout that oneDNN likes best for so many rows."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    return packed


def onednn_linear(x: Tensor, packed: Tensor) -> Tensor:
    """x [R, I] times a matrix of `onednn_pack`: [R, O]."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return out


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this torch, on this machine, multiplies by packed matrices of that format."""
    try:
        x, weight = torch.ones(2, 16, dtype=dtype), torch.ones(32, 16, dtype=dtype)
        return bool((onednn_linear(x, onednn_pack(weight, 2)) == 16).all())
    except (AttributeError, RuntimeError):  # another version of torch, or another processor
        return False


def _linear_case(sizes: Sizes, name: str, outputs: int, inputs: int, rows: int) -> Case:
    """Torch's ways in float32, and in bfloat16 where the weights are; packed ones if it can."""
    formats = [torch.float32, torch.bfloat16] if sizes.is_half else [torch.float32]
    packable = [dtype for dtype in (sizes.dtype,) if has_onednn(dtype)]
    multiply = linear.linear_threaded if sizes.is_threaded else linear.linear
    num_weights = outputs * inputs

    def build() -> Contest:
        generator = sizes.generator()
        x = spread(generator, rows, inputs)
        weight = spread(generator, outputs, inputs, inputs=inputs).to(sizes.dtype)
        wide, packed = weight.float(), linear.pack(weight)

        def kernel() -> Ready:
            mine, index = packed.copy(), np.arange(rows)
            out = np.empty((rows, linear.padded(outputs)), np.float32)
            values, result = x.numpy(), torch.from_numpy(out)[:, :outputs]

            def run() -> Tensor:
                multiply(values, index, mine, out)
                return result

            return Ready(run)

        def in_torch(dtype: torch.dtype) -> Ready:
            return Ready(partial(F.linear, x.to(dtype), wide.to(dtype, copy=True)))

        def in_onednn(dtype: torch.dtype) -> Ready:
            return Ready(partial(onednn_linear, x.to(dtype), onednn_pack(wide.to(dtype), rows)))

        contenders = [Contender(KERNEL, kernel, FLOAT32)]
        for label, make, dtypes in (
            ("torch", in_torch, formats),
            ("onednn packed", in_onednn, packable),
        ):
            for dtype in dtypes:
                contenders.append(
                    Contender(f"{label} {_name(dtype)}", partial(make, dtype), _tolerance(dtype))
                )
        return Contest(tuple(contenders), judge(F.linear(x, wide)))

    others = sum(dtype.itemsize for dtype in (*formats, *packable))
    return Case(
        kernel="linear.linear",
        what=f"{name} {outputs}x{inputs}",
        rows=rows,
        flops=2.0 * rows * num_weights,
        num_bytes=sizes.itemsize * num_weights + 4.0 * rows * (inputs + outputs),
        state_bytes=num_weights * (sizes.itemsize + others),
        touched_bytes=num_weights * (sizes.itemsize + others),
        held_bytes=num_weights * (4 + sizes.itemsize) + 16 * rows * (inputs + outputs),
        build=build,
        absent=() if packable else (f"onednn packed {_name(sizes.dtype)}",),
    )


# --- experts -------------------------------------------------------------------------------


def draw_selection(sizes: Sizes, rows: int, num_experts: int) -> Tensor:
    """bool [R, E]: each pair with probability 1 / E, as trained routers select; one at least."""
    if num_experts == 1:
        return torch.ones(rows, 1, dtype=torch.bool)
    selected = torch.rand(rows, num_experts, generator=sizes.generator()) < 1 / num_experts
    if not bool(selected.any()):
        selected[0, 0] = True
    return selected


def _experts_case(sizes: Sizes, name: str, num_experts: int, inner: int, rows: int) -> Case:
    hidden = sizes.config.hidden_size
    formats = [torch.float32, torch.bfloat16] if sizes.is_half else [torch.float32]
    selected = draw_selection(sizes, rows, num_experts)
    num_pairs = int(selected.sum())
    expert_weights = 3 * inner * hidden
    num_weights = num_experts * expert_weights

    def build() -> Contest:
        generator = sizes.generator()
        u = spread(generator, rows, hidden)
        affinities = torch.rand(rows, num_experts, generator=generator)
        shape = (num_experts, inner, hidden)
        gate, up = (spread(generator, *shape, inputs=hidden).to(sizes.dtype) for _ in range(2))
        down = spread(generator, num_experts, hidden, inner, inputs=inner).to(sizes.dtype)
        packed = experts.pack_gate_up(gate, up), experts.pack_down(down)
        wide = tuple(weight.float() for weight in (gate, up, down))

        def kernel() -> Ready:
            gate_up, mine = packed[0].copy(), packed[1].copy()
            out, index = np.empty((rows, hidden), np.float32), np.arange(rows)
            values, weights, chosen = u.numpy(), affinities.numpy(), selected.numpy()
            result, threads = torch.from_numpy(out), sizes.is_threaded

            def run() -> Tensor:
                out.fill(0)  # the kernel adds, and its twin begins with zeros too
                experts.routed_experts(values, index, chosen, weights, gate_up, mine, threads, out)
                return result

            return Ready(run)

        def in_torch(dtype: torch.dtype) -> Ready:
            own = (weight.to(dtype, copy=True) for weight in wide)
            return Ready(partial(reference.routed_experts, u.to(dtype), selected, affinities, *own))

        twins = (
            Contender(f"torch {_name(dtype)}", partial(in_torch, dtype), _tolerance(dtype))
            for dtype in formats
        )
        wanted = reference.routed_experts(u, selected, affinities, *wide)
        return Contest((Contender(KERNEL, kernel, FLOAT32), *twins), judge(wanted))

    num_distinct = int(selected.any(0).sum())
    others = sum(dtype.itemsize for dtype in formats)
    return Case(
        kernel="experts.routed_experts",
        what=f"{name} {num_experts}x{inner}x{hidden}, {num_pairs} pairs",
        rows=rows,
        flops=2.0 * num_pairs * expert_weights,
        num_bytes=sizes.itemsize * num_distinct * expert_weights + 8.0 * rows * hidden,
        state_bytes=num_weights * (sizes.itemsize + others),
        touched_bytes=num_distinct * expert_weights * (sizes.itemsize + others),
        held_bytes=num_weights * (4 + sizes.itemsize) + 16 * rows * (hidden + num_experts * inner),
        build=build,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tolerance(dtype: torch.dtype) -> float:
    return BFLOAT16 if dtype is torch.bfloat16 else FLOAT32
