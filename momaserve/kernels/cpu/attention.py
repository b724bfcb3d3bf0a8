"""Attention of single rows straight over the blocks that hold their K/V; nothing is copied."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from momaserve.kernels.cpu.jit import kernel, threaded
from momaserve.kernels.cpu.scalar import exp32, narrow
from momaserve.kernels.cpu.vectors import add_scaled, dots


@kernel
def store(qkv: Any, first: int, slots: Any, keys: Any, values: Any) -> None:
    """Writes K and V of each row to its slot, in the memory's number format.

    qkv is [T, (H + 2G) K or more] with the keys from column `first` on, slots int64 [T], keys and
    values [slots, G, K].
    """
    num_kv_heads, head_dim = keys.shape[1:]
    width = num_kv_heads * head_dim
    for t in range(len(slots)):
        slot = slots[t]
        for g in range(num_kv_heads):
            for i in range(head_dim):
                column = first + g * head_dim + i
                keys[slot, g, i] = narrow(qkv[t, column], keys)
                values[slot, g, i] = narrow(qkv[t, column + width], values)


@kernel
def append(
    taken: Any,
    sequences: Any,
    tables: Any,
    slots_per_block: int,
    places: Any,
    counts: Any,
    index: Any,
    slots: Any,
) -> None:
    """Gives the rows that a depth-routed layer takes their slots, behind those given out.

    Args:
        taken: bool [T].
        sequences: int64 [T], the sequence of each row.
        tables: int64 [S, blocks], blocks of the entries of each sequence.
        places: int64 [T], where `index` tells of each row.
        counts: int64 [S], entries of each sequence so far; counted on.
        index: int32 [places], written at the rows: slot, or -1.
        slots: int64 [T], the same.
    """
    for t in range(len(taken)):
        slots[t] = -1
        if taken[t]:
            sequence = sequences[t]
            number = counts[sequence]
            block = tables[sequence, number // slots_per_block]
            slots[t] = block * slots_per_block + number % slots_per_block
            counts[sequence] = number + 1
        index[places[t]] = slots[t]


@kernel
def list_slots(
    rows: Any,
    positions: Any,
    tables: Any,
    block_size: int,
    block_stride: int,
    index: Any,
    slots: Any,
    counts: Any,
) -> None:
    """Lists what each row sees: its sequence's tokens up to itself.

    Args:
        rows: int64 [R, 2], rows, and for each the row of `tables` that has the blocks of its
            sequence.
        positions: int64 [T]; a row sees positions 0 to its own.
        tables: int32 [S, blocks], ids of blocks.
        block_size: tokens of a block.
        block_stride: slots of a block, of which the first `block_size` are a plain layer's.
        index: int32 [blocks * block_size], slots of the tokens that a depth-routed layer took, -1
            for the others; an empty array stands for plain layers, whose slots follow from tables.
        slots: int32 [R, most], written: slots of what each row sees, in order.
        counts: int64 [R], written: how many those are.
    """
    for r in range(rows.shape[0]):
        length, table = positions[rows[r, 0]] + 1, tables[rows[r, 1]]
        count = 0
        for first in range(0, length, block_size):
            block = table[first // block_size]
            for i in range(min(block_size, length - first)):
                if len(index) == 0:
                    slots[r, count] = block * block_stride + i
                    count += 1
                else:
                    slot = index[block * block_size + i]
                    if slot >= 0:
                        slots[r, count] = slot
                        count += 1
        counts[r] = count


def _attend(
    q: Any, keys: Any, values: Any, rows: Any, slots: Any, counts: Any, num_parts: int, out: Any
) -> None:
    """Attention of each row over what it sees.

    Args:
        q: [T, H K or more], queries in the first H K columns.
        keys, values: [slots, G, K].
        rows: int64 [R, 2], the rows to compute in the first column.
        slots: int32 [R, most], what they see, and counts: int64 [R], how many, by `list_slots`.
        num_parts: into how many the heads of a row are divided, at most G. The heads of a token
            lie side by side, and memory gives them faster the more are read together.
        out: [T, H K], written at the rows.
    """
    num_kv_heads, head_dim = keys.shape[1:]
    width = num_kv_heads * head_dim
    per_kv = out.shape[1] // head_dim // num_kv_heads
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    for work in prange(rows.shape[0] * num_parts):
        r, part = work // num_parts, work % num_parts
        t, listed, seen = rows[r, 0], slots[r], counts[r]
        whole = seen - seen % 4
        first_head = part * num_kv_heads // num_parts * per_kv
        last_head = (part + 1) * num_kv_heads // num_parts * per_kv
        scores = np.empty((last_head - first_head, seen), np.float32)
        for s in range(0, whole, 4):  # four at a time, which keeps the vector units busy
            for h in range(first_head, last_head):
                at = (h // per_kv) * head_dim
                places = (
                    listed[s] * width + at, listed[s + 1] * width + at,
                    listed[s + 2] * width + at, listed[s + 3] * width + at,
                )  # fmt: skip
                found = scores[h - first_head]
                found[s], found[s + 1], found[s + 2], found[s + 3] = dots(
                    q, t * q.shape[1] + h * head_dim, keys, places, head_dim, 4 * width
                )
        for s in range(whole, seen):
            for h in range(first_head, last_head):
                place = listed[s] * width + (h // per_kv) * head_dim
                (scores[h - first_head, s],) = dots(
                    q, t * q.shape[1] + h * head_dim, keys, (place,), head_dim, 0
                )
        for h in range(first_head, last_head):
            found = scores[h - first_head]
            best = np.float32(-np.inf)
            for s in range(seen):
                found[s] *= scale
                best = max(best, found[s])
            total = np.float32(0)
            for s in range(seen):
                found[s] = exp32(found[s] - best)
                total += found[s]
            for s in range(seen):
                found[s] /= total
            for i in range(head_dim):
                out[t, h * head_dim + i] = np.float32(0)
        for s in range(0, whole, 4):
            for h in range(first_head, last_head):
                at = (h // per_kv) * head_dim
                places = (
                    listed[s] * width + at, listed[s + 1] * width + at,
                    listed[s + 2] * width + at, listed[s + 3] * width + at,
                )  # fmt: skip
                found = scores[h - first_head]
                weights = found[s], found[s + 1], found[s + 2], found[s + 3]
                add_scaled(
                    weights,
                    values,
                    places,
                    head_dim,
                    out,
                    t * out.shape[1] + h * head_dim,
                    4 * width,
                )
        for s in range(whole, seen):
            for h in range(first_head, last_head):
                place = listed[s] * width + (h // per_kv) * head_dim
                weight = scores[h - first_head, s]
                add_scaled(
                    (weight,), values, (place,), head_dim, out, t * out.shape[1] + h * head_dim, 0
                )


attend = kernel(_attend)
attend_threaded = threaded(_attend)
