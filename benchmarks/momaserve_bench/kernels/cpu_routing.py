"""Cases of routers: scores, auxiliary routers, selection, counting."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from momaserve.kernels import reference
from momaserve.kernels.cpu import linear, routing
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

TWIN = "torch float32"
"""Routers are float32 whatever the weights' format."""


def routing_cases(sizes: Sizes) -> Iterator[Case]:
    """Routers of groups with several experts and of depth-routed layers, each shape once."""
    config = sizes.config
    shapes: dict[tuple[int, int], list[str]] = {}
    for group in config.expert_groups:
        if group.has_router:
            shape = (group.num_experts, group.aux_hidden_size)
            shapes.setdefault(shape, []).append(group.name)
    if config.depth_routing is not None:
        shapes.setdefault((1, config.depth_routing.aux_hidden_size), []).append("depth")
    for (outputs, aux), names in shapes.items():
        name = "+".join(names)
        for rows in sizes.rows:
            yield _scores_case(sizes, name, outputs, rows)
            yield _auxiliary_case(sizes, name, outputs, aux, rows)
            yield _select_case(sizes, name, outputs, rows)
            yield _count_case(sizes, name, outputs, rows)


def _scores_case(sizes: Sizes, name: str, outputs: int, rows: int) -> Case:
    hidden = sizes.config.hidden_size

    def build() -> Contest:
        generator = sizes.generator()
        x, weight = spread(generator, rows, hidden), spread(generator, outputs, hidden)

        def kernel() -> Ready:
            mine, index, values = weight.numpy().copy(), np.arange(rows), x.numpy()
            both = np.empty((2, rows, outputs), np.float32)
            logits, weights, result = both[0], both[1], torch.from_numpy(both)

            def run() -> Tensor:
                routing.scores(values, index, mine, logits, weights)
                return result

            return Ready(run)

        def score(mine: Tensor) -> Tensor:
            logits = F.linear(x, mine)
            return torch.stack((logits, logits.sigmoid()))

        def in_torch() -> Ready:
            return Ready(partial(score, weight.clone()))

        contenders = (Contender(KERNEL, kernel, FLOAT32), Contender(TWIN, in_torch, FLOAT32))
        return Contest(contenders, judge(score(weight)))

    num_weights = outputs * hidden
    return Case(
        kernel="routing.scores",
        what=f"{name} {outputs}x{hidden}",
        rows=rows,
        flops=2.0 * rows * num_weights,
        num_bytes=4.0 * (num_weights + rows * (hidden + 2 * outputs)),
        state_bytes=8 * num_weights,
        touched_bytes=8 * num_weights,
        held_bytes=4 * num_weights + 16 * rows * (hidden + outputs),
        build=build,
    )


def _auxiliary_case(sizes: Sizes, name: str, outputs: int, aux: int, rows: int) -> Case:
    hidden = sizes.config.hidden_size

    def build() -> Contest:
        generator = sizes.generator()
        x = spread(generator, rows, hidden)
        fc1 = spread(generator, aux, hidden, inputs=hidden)
        fc2 = spread(generator, outputs, aux, inputs=aux)
        packed = linear.pack(fc1)

        def kernel() -> Ready:
            first, second, index = packed.copy(), fc2.numpy().copy(), np.arange(rows)
            out, values, threads = np.empty((rows, outputs), np.float32), x.numpy(), sizes.threads
            result = torch.from_numpy(out)

            def run() -> Tensor:
                routing.auxiliary(values, index, first, second, threads > 1, out)
                return result

            return Ready(run)

        def in_torch() -> Ready:
            return Ready(partial(reference.router_hidden, x, fc1.clone(), fc2.clone()))

        contenders = (Contender(KERNEL, kernel, FLOAT32), Contender(TWIN, in_torch, FLOAT32))
        return Contest(contenders, judge(reference.router_hidden(x, fc1, fc2)))

    num_weights = aux * (hidden + outputs)
    return Case(
        kernel="routing.auxiliary",
        what=f"{name} {outputs}x{aux}x{hidden}",
        rows=rows,
        flops=2.0 * rows * num_weights,
        num_bytes=4.0 * (num_weights + rows * (hidden + outputs)),
        state_bytes=8 * num_weights,
        touched_bytes=8 * num_weights,
        held_bytes=8 * num_weights + 16 * rows * (hidden + aux),
        build=build,
    )


def _select_case(sizes: Sizes, name: str, outputs: int, rows: int) -> Case:
    """Two policies in one batch, as requests may have them; the second one is selected by."""

    def build() -> Contest:
        generator = sizes.generator()
        scores, thresholds = spread(generator, rows, outputs), spread(generator, outputs)
        policies = torch.randint(0, 2, (rows,), generator=generator, dtype=torch.int8)

        def kernel() -> Ready:
            mine, limits, kinds = scores.numpy(), thresholds.numpy(), policies.numpy()
            index, out = np.arange(rows), np.zeros((rows, outputs), np.bool_)
            result = torch.from_numpy(out)

            def run() -> Tensor:
                routing.select(mine, limits, kinds, index, 1, out)
                return result

            return Ready(run)

        def select() -> Tensor:
            return (scores > thresholds) & (policies == 1).unsqueeze(1)

        contenders = (
            Contender(KERNEL, kernel, EXACT),
            Contender(TWIN, lambda: Ready(select), EXACT),
        )
        return Contest(contenders, judge(select()))

    return Case(
        kernel="routing.select",
        what=f"{name} {outputs}",
        rows=rows,
        flops=0.0,
        num_bytes=rows * (5.0 * outputs + 1),
        state_bytes=0,
        touched_bytes=0,
        held_bytes=32 * rows * (outputs + 1),
        build=build,
    )


def _count_case(sizes: Sizes, name: str, outputs: int, rows: int) -> Case:
    """Rows of each expert, then rows by how many experts they have."""

    def build() -> Contest:
        selected = spread(sizes.generator(), rows, outputs) > 0

        def kernel() -> Ready:
            mine, counts = selected.numpy().copy(), np.empty(2 * outputs + 1, np.int64)
            result = torch.from_numpy(counts)

            def run() -> Tensor:
                counts[:] = 0
                routing.count(mine, counts)
                return result

            return Ready(run)

        def count(mine: Tensor) -> Tensor:
            sizes_of_rows = torch.bincount(mine.sum(1), minlength=outputs + 1)
            return torch.cat((mine.sum(0), sizes_of_rows))

        def in_torch() -> Ready:
            return Ready(partial(count, selected.clone()))

        contenders = (Contender(KERNEL, kernel, EXACT), Contender(TWIN, in_torch, EXACT))
        return Contest(contenders, judge(count(selected)))

    return Case(
        kernel="routing.count",
        what=f"{name} {outputs}",
        rows=rows,
        flops=0.0,
        num_bytes=1.0 * rows * outputs + 8 * (2 * outputs + 1),
        state_bytes=0,
        touched_bytes=0,
        held_bytes=16 * rows * (outputs + 1),
        build=build,
    )
