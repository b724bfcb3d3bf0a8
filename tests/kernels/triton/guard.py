"""Attention over tensors that end where memory ends: whoever reads on is killed.

`python -m tests.kernels.triton.guard` runs every case and prints how many; `... guard beyond` has a
sequence that is longer than its block table, to show that reading on is noticed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from dataclasses import replace

import torch
from torch import Tensor

from tests.kernels.triton.paged import Paged, make_paged

_PROT_NONE = 0
_LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose last byte is the last before a page that nobody may touch."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    num_pages = -(-size // page)
    memory = mmap.mmap(-1, (num_pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end = ctypes.c_void_p(start + num_pages * page)
    if _LIBC.mprotect(end, ctypes.c_size_t(page), _PROT_NONE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    copy = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=num_pages * page - size
    )
    return copy.view(tensor.shape).copy_(tensor)


def guarded_case(num_queries: list[int], seq_lens: list[int], density: float | None) -> Paged:
    """Sequences whose block tables have no entry to spare."""
    paged = make_paged(num_queries, seq_lens, block_size=8, heads=(2, 1), density=density)
    width = max(-(-length // paged.block_size) for length in seq_lens)
    return replace(
        paged,
        q=guarded(paged.q),
        block_tables=guarded(paged.block_tables[:, :width].contiguous()),
        seq_lens=guarded(paged.seq_lens),
        cu_seqlens_q=guarded(paged.cu_seqlens_q),
        index=None if paged.index is None else guarded(paged.index),
    )


def main(arguments: list[str]) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.kernels.triton.test_attention import attend

    if arguments == ["beyond"]:
        paged = guarded_case([1, 1], [9, 64], None)
        attend(replace(paged, seq_lens=paged.seq_lens + 8192), max_len=64)
        return
    num_cases = 0
    for density in (None, 0.4):
        # The last sequence's last tile ends behind its table's last entry.
        for num_queries, seq_lens in (([1, 1], [9, 70]), ([3, 20], [9, 70]), ([70], [70])):
            paged = guarded_case(num_queries, seq_lens, density)
            torch.testing.assert_close(attend(paged), paged.wanted, rtol=1e-4, atol=1e-4)
            num_cases += 1
    print(num_cases)


if __name__ == "__main__":
    main(sys.argv[1:])
