"""Which steps share buffers and captured graphs. Needs no Triton."""

from __future__ import annotations

_FIRST_BUCKETS = (1, 2, 4, 8, 12)
_LEAST_BLOCKS = 8


def rows_bucket(num_rows: int) -> int:
    """1, 2, 4, 8, 12, 16, 24, 32, 48, ...: at most a third of more than 8 rows is padding."""
    if num_rows <= _FIRST_BUCKETS[-1]:
        return next(size for size in _FIRST_BUCKETS if size >= num_rows)
    size = 1 << (num_rows - 1).bit_length()
    return size * 3 // 4 if num_rows <= size * 3 // 4 else size


def blocks_bucket(num_blocks: int) -> int:
    """8, 32, 128, 512, ...: a table's width costs nothing but its copy, splits of attention that
    find no positions leave at once, and every bucket is a graph to capture."""
    size = _LEAST_BLOCKS
    while size < num_blocks:
        size *= 4
    return size
