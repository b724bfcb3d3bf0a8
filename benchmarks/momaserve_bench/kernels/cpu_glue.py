"""Cases of what lies between matrices: embedding, norms, rotary angles, residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from momaserve.kernels import reference
from momaserve.kernels.cpu import glue
from momaserve.kernels.cpu.linear import Array, padded
from momaserve_bench.kernels.case import (
    EXACT,
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
from momaserve_bench.kernels.cpu_attention import as_array

TWIN = "torch float32"
FUSED = "torch fused float32"


def glue_cases(sizes: Sizes) -> Iterator[Case]:
    """Every kernel of `kernels.cpu.glue`."""
    makers: list[Callable[[Sizes, int], Case]] = [
        _embed_case,
        _add_case,
        _rms_norm_case,
        _add_rms_norm_case,
        _rotate_case,
    ]
    if sizes.config.qk_norm:
        makers.append(_norm_heads_case)
    makers.append(_blend_case)
    for make in makers:
        for rows in sizes.rows:
            yield make(sizes, rows)


def _writes(call: Callable[[Array], None], *shape: int) -> Ready:
    """A kernel that writes float32 numbers of this shape."""
    out = np.empty(shape, np.float32)
    result = torch.from_numpy(out)

    def run() -> Tensor:
        call(out)
        return result

    return Ready(run)


def _changes(call: Callable[[Array], None], before: Tensor, columns: int | None = None) -> Ready:
    """A kernel that changes what was there; of the result, the first `columns` count."""
    result = before.clone()
    values = result.numpy()
    shown = result[:, :columns]

    def run() -> Tensor:
        call(values)
        return shown

    return Ready(run, prepare=lambda: np.copyto(values, before.numpy()))


def _contest(
    kernel: Callable[[], Ready],
    twin: Callable[[], Tensor],
    *fused: Callable[[], Tensor],
    tolerance: float = FLOAT32,
) -> Contest:
    """Of kernels over activations alone."""
    contenders = [
        Contender(KERNEL, kernel, tolerance),
        Contender(TWIN, partial(Ready, twin), tolerance),
    ]
    contenders += [Contender(FUSED, partial(Ready, one), FLOAT32) for one in fused]
    return Contest(tuple(contenders), judge(twin().clone()))


def _case(
    kernel: str, what: str, rows: int, width: int, *, flops: float, num_bytes: float
) -> Callable[[Callable[[], Contest]], Case]:
    """Decorates the `build` of a kernel over activations [rows, width]."""

    def of(build: Callable[[], Contest]) -> Case:
        return Case(
            kernel=f"glue.{kernel}",
            what=what,
            rows=rows,
            flops=flops,
            num_bytes=num_bytes,
            state_bytes=0,
            touched_bytes=0,
            held_bytes=64 * rows * width,
            build=build,
        )

    return of


def _embed_case(sizes: Sizes, rows: int) -> Case:
    """The rows of the table that are read are its state; the others would only take memory."""
    hidden = sizes.config.hidden_size

    def build() -> Contest:
        generator = sizes.generator()
        table = spread(generator, rows, hidden).to(sizes.dtype)
        ids = torch.randperm(rows, generator=generator)

        def kernel() -> Ready:
            return _writes(partial(glue.embed, ids.numpy(), as_array(table.clone())), rows, hidden)

        def in_torch() -> Ready:
            own = table.clone()
            return Ready(lambda: F.embedding(ids, own).float())

        name = f"torch {str(sizes.dtype).removeprefix('torch.')}"
        contenders = (Contender(KERNEL, kernel, EXACT), Contender(name, in_torch, EXACT))
        return Contest(contenders, judge(table[ids].float()))

    state = rows * hidden * sizes.itemsize
    return Case(
        kernel="glue.embed",
        what=f"{hidden}",
        rows=rows,
        flops=0.0,
        num_bytes=rows * hidden * (sizes.itemsize + 4.0),
        state_bytes=2 * state,
        touched_bytes=2 * state,
        held_bytes=state + 16 * rows * hidden,
        build=build,
    )


def _add_case(sizes: Sizes, rows: int) -> Case:
    hidden = sizes.config.hidden_size
    moved = 12.0 * rows * hidden

    @_case("add", f"{hidden}", rows, hidden, flops=1.0 * rows * hidden, num_bytes=moved)
    def case() -> Contest:
        x, y = _two(sizes, rows)
        call = partial(glue.add, x.numpy(), y.numpy())
        return _contest(
            lambda: _writes(call, rows, hidden), lambda: x + y[:, :hidden], tolerance=EXACT
        )

    return case


def _rms_norm_case(sizes: Sizes, rows: int) -> Case:
    hidden, eps = sizes.config.hidden_size, sizes.config.rms_norm_eps
    flops, moved = 4.0 * rows * hidden, 4.0 * hidden * (2 * rows + 1)

    @_case("rms_norm", f"{hidden}", rows, hidden, flops=flops, num_bytes=moved)
    def case() -> Contest:
        generator = sizes.generator()
        x, weight = spread(generator, rows, hidden), spread(generator, hidden)
        call = partial(glue.rms_norm, x.numpy(), weight.numpy(), np.float32(eps))
        return _contest(
            lambda: _writes(call, rows, hidden),
            lambda: reference.rms_norm(x, weight, eps),
            lambda: F.rms_norm(x, (hidden,), weight, eps),
        )

    return case


def _add_rms_norm_case(sizes: Sizes, rows: int) -> Case:
    hidden, eps = sizes.config.hidden_size, sizes.config.rms_norm_eps
    flops, moved = 5.0 * rows * hidden, 4.0 * hidden * (3 * rows + 1)

    @_case("add_rms_norm", f"{hidden}", rows, hidden, flops=flops, num_bytes=moved)
    def case() -> Contest:
        x, y = _two(sizes, rows)
        weight = spread(sizes.generator(), hidden)
        call = partial(glue.add_rms_norm, x.numpy(), y.numpy(), weight.numpy(), np.float32(eps))
        mine = y[:, :hidden]
        return _contest(
            lambda: _writes(call, rows, hidden),
            lambda: x + reference.rms_norm(mine, weight, eps),
            lambda: x + F.rms_norm(mine, (hidden,), weight, eps),
        )

    return case


def _norm_heads_case(sizes: Sizes, rows: int) -> Case:
    config = sizes.config
    heads, size = config.num_attention_heads + config.num_key_value_heads, config.head_dim
    used, width = heads * size, (heads + config.num_key_value_heads) * size
    flops, moved = 8.0 * rows * used, 8.0 * used * (rows + 1)

    @_case("norm_heads", f"{heads} heads of {size}", rows, width, flops=flops, num_bytes=moved)
    def case() -> Contest:
        generator = sizes.generator()
        qkv = spread(generator, rows, width)
        weight, bias = spread(generator, heads, size), spread(generator, heads, size)
        numbers = weight.numpy(), bias.numpy()
        parts = qkv.view(rows, -1, size)[:, :heads]
        return _contest(
            lambda: _changes(lambda values: glue.norm_heads(values, *numbers, size), qkv, used),
            lambda: reference.head_layer_norm(parts, weight, bias).flatten(1),
        )

    return case


def _rotate_case(sizes: Sizes, rows: int) -> Case:
    config = sizes.config
    heads, size = config.num_attention_heads + config.num_key_value_heads, config.head_dim
    used, width = heads * size, (heads + config.num_key_value_heads) * size
    flops, moved = 3.0 * rows * used, 4.0 * rows * (2 * used + size)

    @_case("rotate", f"{heads} heads of {size}", rows, width, flops=flops, num_bytes=moved)
    def case() -> Contest:
        generator = sizes.generator()
        qkv = spread(generator, rows, width)
        limit = config.max_position_embeddings
        positions = torch.randint(0, limit, (rows,), generator=generator)
        table = reference.rope_table(limit, size, config.rope_theta)
        arrays = table.numpy(), positions.numpy(), heads
        parts = qkv.view(rows, -1, size)[:, :heads]
        return _contest(
            lambda: _changes(lambda values: glue.rotate(values, *arrays), qkv, used),
            lambda: reference.apply_rope(parts, table[positions]).flatten(1),
        )

    return case


def _blend_case(sizes: Sizes, rows: int) -> Case:
    """A depth-routed layer that takes half of the rows."""
    hidden, taken = sizes.config.hidden_size, (rows + 1) // 2
    flops, moved = 3.0 * taken * hidden, 12.0 * taken * hidden

    @_case("blend", f"{hidden}, {taken} rows", rows, hidden, flops=flops, num_bytes=moved)
    def case() -> Contest:
        generator = sizes.generator()
        x, y = spread(generator, rows, hidden), spread(generator, taken, hidden)
        index = torch.randperm(rows, generator=generator)[:taken]
        weight = torch.rand(taken, generator=generator)
        arrays = index.numpy(), y.numpy(), weight.numpy()

        def twin() -> Tensor:
            return x.index_add(0, index, weight.unsqueeze(1) * (y - x[index]))

        return _contest(lambda: _changes(lambda values: glue.blend(values, *arrays), x), twin)

    return case


def _two(sizes: Sizes, rows: int) -> tuple[Tensor, Tensor]:
    """A residual [R, D] and what a layer adds to it, as wide as packed products are."""
    generator, hidden = sizes.generator(), sizes.config.hidden_size
    return spread(generator, rows, hidden), spread(generator, rows, padded(hidden))
