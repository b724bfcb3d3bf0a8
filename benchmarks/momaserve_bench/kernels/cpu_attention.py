"""Cases of attention over blocks, and of storing K/V in them."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from momaserve.config import CacheConfig
from momaserve.kernels import reference
from momaserve.kernels.cpu import attention
from momaserve.kernels.cpu.linear import Array
from momaserve_bench.kernels.case import (
    BFLOAT16,
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

BLOCK_SIZE = CacheConfig().block_size


def attention_cases(sizes: Sizes) -> Iterator[Case]:
    """Rows that decode, each in a sequence of its own; with mixture of depths also those."""
    depth = sizes.config.depth_routing
    for rows in sizes.rows:
        yield _store_case(sizes, rows)
        if depth is not None:
            yield _append_case(sizes, rows, fmean(depth.capacity))
    for context in sizes.contexts:
        for rows in sizes.rows:
            yield _attend_case(sizes, rows, context, None)
            if depth is not None:
                yield _attend_case(sizes, rows, context, fmean(depth.capacity))


def as_array(memory: Tensor) -> Array:
    """float32 as it is, bfloat16 as uint16, as the kernels read K/V; shares memory."""
    if memory.dtype is torch.float32:
        return memory.numpy()
    return memory.view(torch.int16).numpy().view(np.uint16)


def _attend_case(sizes: Sizes, rows: int, context: int, capacity: float | None) -> Case:
    """
    Args:
        capacity: share of the tokens that a depth-routed layer took; None is a plain layer.
    """
    config = sizes.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    num_blocks = -(-context // BLOCK_SIZE)
    num_slots = rows * num_blocks * BLOCK_SIZE
    is_routed = capacity is not None
    seen = torch.ones(rows, context, dtype=torch.bool)
    if capacity is not None:
        seen = torch.rand(rows, context, generator=sizes.generator()) < capacity
        seen[:, -1] = True  # a row that is attended was taken itself
    num_seen = int(seen.sum())

    def build() -> Contest:
        generator = sizes.generator()
        qkv = spread(generator, rows, (heads + 2 * groups) * size)
        keys, values = (
            spread(generator, num_slots, groups, size).to(sizes.dtype) for _ in range(2)
        )
        order = torch.randperm(rows * num_blocks, generator=generator)
        tables = order.view(rows, num_blocks).to(torch.int32)
        places = torch.arange(context)
        slots = tables[:, places // BLOCK_SIZE].long() * BLOCK_SIZE + places % BLOCK_SIZE
        query = qkv[:, : heads * size].reshape(rows, 1, heads, size)
        mask = seen[:, None, None, :]

        def kernel() -> Ready:
            own = as_array(keys.clone()), as_array(values.clone())
            found = np.full(num_slots if is_routed else 0, -1, np.int32)
            if is_routed:  # the entry of a token is where its K/V would be in a plain layer
                found[slots.numpy()] = np.where(seen.numpy(), slots.numpy(), -1)
            index = np.stack((np.arange(rows), np.arange(rows)), axis=1)
            positions = np.full(rows, context - 1, np.int64)
            out = np.empty((rows, heads * size), np.float32)
            attend = attention.attend_threaded if sizes.is_threaded else attention.attend
            num_parts = min(groups, -(-2 * sizes.threads // rows)) if sizes.is_threaded else 1
            listed, counts = np.empty((rows, context), np.int32), np.empty(rows, np.int64)
            where = (index, positions, tables.numpy(), BLOCK_SIZE, BLOCK_SIZE, found)
            attention.list_slots(*where, listed, counts)
            result = torch.from_numpy(out)

            def run() -> Tensor:
                if is_routed:  # plain layers share one list
                    attention.list_slots(*where, listed, counts)
                attend(qkv.numpy(), *own, index, listed, counts, num_parts, out)
                return result

            return Ready(run)

        def paged() -> Ready:
            """As `runner.paged_attention` does it."""
            own_keys, own_values, q = keys.clone(), values.clone(), query.to(sizes.dtype)

            def run() -> Tensor:
                return reference.attend(q, own_keys[slots], own_values[slots], mask).flatten(1)

            return Ready(run)

        def contiguous() -> Ready:
            """As if each sequence lay in one piece: what torch could do without blocks."""
            k, v, q = keys[slots], values[slots], query.to(sizes.dtype)

            def run() -> Tensor:
                return reference.attend(q, k, v, mask if is_routed else None).flatten(1)

            return Ready(run)

        wanted = reference.attend(query, keys[slots].float(), values[slots].float(), mask)
        tolerance = BFLOAT16 if sizes.is_half else FLOAT32
        contenders = (
            Contender(KERNEL, kernel, FLOAT32),
            Contender(f"torch blocks {_format(sizes)}", paged, tolerance),
            Contender(f"torch contiguous {_format(sizes)}", contiguous, tolerance),
        )
        return Contest(contenders, judge(wanted.flatten(1)))

    per_token = 2 * groups * size
    state = num_slots * per_token * sizes.itemsize
    return Case(
        kernel="attention.attend",
        what=f"{heads}/{groups} heads of {size}" + (", depth-routed" if is_routed else ""),
        rows=rows,
        context=context,
        flops=4.0 * num_seen * heads * size,
        num_bytes=sizes.itemsize * num_seen * per_token + 8.0 * rows * heads * size,
        state_bytes=3 * state,
        touched_bytes=2 * state + num_seen * per_token * sizes.itemsize,
        # The one copy that is gathered for each call, and the float32 one that is compared with.
        held_bytes=2 * state + 4 * num_slots * per_token + 64 * rows * (heads + groups) * size,
        build=build,
    )


def _store_case(sizes: Sizes, rows: int) -> Case:
    config = sizes.config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def build() -> Contest:
        generator = sizes.generator()
        qkv = spread(generator, rows, (heads + 2 * groups) * size)
        parts = qkv.view(rows, -1, size)
        k, v = parts[:, heads : heads + groups], parts[:, heads + groups :]
        slots = torch.randperm(rows, generator=generator)

        def memory() -> Tensor:
            """K and V: [2, slots, G, K]."""
            return torch.zeros(2, rows, groups, size, dtype=sizes.dtype)

        def kernel() -> Ready:
            whole = memory()
            keys, values = as_array(whole[0]), as_array(whole[1])
            numbers, index, first = qkv.numpy(), slots.numpy(), heads * size

            def run() -> Tensor:
                attention.store(numbers, first, index, keys, values)
                return whole

            return Ready(run)

        def in_torch() -> Ready:
            whole = memory()
            keys, values = whole

            def run() -> Tensor:
                keys.index_copy_(0, slots, k.to(sizes.dtype))
                values.index_copy_(0, slots, v.to(sizes.dtype))
                return whole

            return Ready(run)

        wanted = memory()
        wanted[:, slots] = torch.stack((k, v)).to(sizes.dtype)
        contenders = (
            Contender(KERNEL, kernel, EXACT),
            Contender(f"torch {_format(sizes)}", in_torch, EXACT),
        )
        return Contest(contenders, judge(wanted))

    state = rows * 2 * groups * size * sizes.itemsize
    return Case(
        kernel="attention.store",
        what=f"{groups} heads of {size}",
        rows=rows,
        flops=0.0,
        num_bytes=rows * 2 * groups * size * (4.0 + sizes.itemsize),
        state_bytes=2 * state,
        touched_bytes=2 * state,
        held_bytes=state + 8 * rows * (heads + 2 * groups) * size,
        build=build,
    )


def _append_case(sizes: Sizes, rows: int, capacity: float) -> Case:
    """Slots for what a depth-routed layer takes; each row decodes in a sequence of its own."""

    def build() -> Contest:
        generator = sizes.generator()
        taken = torch.rand(rows, generator=generator) < capacity
        counts = torch.randint(0, BLOCK_SIZE, (rows,), generator=generator)
        tables = torch.randperm(rows, generator=generator).unsqueeze(1)
        places = sequences = torch.arange(rows)
        wanted = torch.where(taken, tables[:, 0] * BLOCK_SIZE + counts, -1)

        def kernel() -> Ready:
            index, slots = np.empty(rows, np.int32), np.empty(rows, np.int64)
            result, start, running = torch.from_numpy(slots), counts.numpy(), counts.clone().numpy()
            arguments = taken.numpy(), sequences.numpy(), tables.numpy()

            def run() -> Tensor:
                running[:] = start
                attention.append(*arguments, BLOCK_SIZE, places.numpy(), running, index, slots)
                return result

            return Ready(run)

        def in_torch() -> Ready:
            index = torch.empty(rows, dtype=torch.int32)

            def run() -> Tensor:
                """As `runner.step_entries` does it."""
                order = taken.cumsum(0)
                before = order - taken.long()
                number = counts + order - before - 1
                blocks = tables[sequences, number.clamp_min(0) // BLOCK_SIZE]
                slots = torch.where(taken, blocks * BLOCK_SIZE + number % BLOCK_SIZE, -1)
                counts.clone().index_add_(0, sequences, taken.long())
                index[places] = slots.int()
                return slots

            return Ready(run)

        contenders = (Contender(KERNEL, kernel, EXACT), Contender("torch", in_torch, EXACT))
        return Contest(contenders, judge(wanted))

    return Case(
        kernel="attention.append",
        what=f"{capacity:.0%} taken",
        rows=rows,
        flops=0.0,
        num_bytes=rows * (1 + 5 * 8 + 4.0),
        state_bytes=0,
        touched_bytes=0,
        held_bytes=64 * rows,
        build=build,
    )


def _format(sizes: Sizes) -> str:
    return str(sizes.dtype).removeprefix("torch.")
