"""Paged attention and its twin against plain attention over the sequences themselves."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from momaserve.kernels import reference_paged
from momaserve.kernels.triton.attention import paged_attention
from momaserve.kernels.triton.attention_tiles import scratch_shape
from tests.kernels.triton.device import DEVICE, DTYPES, assert_close
from tests.kernels.triton.paged import Paged, make_paged


def attend(paged: Paged, function: Any = paged_attention, **options: Any) -> Tensor:
    queries = paged.cu_seqlens_q.diff()
    options = {
        "max_q": max(int(queries.max()), 1) if len(queries) else 1,
        "max_len": int(paged.seq_lens.max()) if len(queries) else 0,
        **options,
    }
    result: Tensor = function(
        paged.q,
        paged.keys,
        paged.values,
        paged.block_tables,
        paged.seq_lens,
        paged.cu_seqlens_q,
        block_size=paged.block_size,
        block_stride=paged.block_stride,
        layer_offset=paged.layer_offset,
        index=paged.index,
        **options,
    )
    return result


def scratch(paged: Paged, splits: int) -> Tensor:
    """With NaN in it, as memory may have."""
    _, num_heads, head_dim = paged.q.shape
    shape = scratch_shape(splits, len(paged.seq_lens), num_heads, head_dim)
    return torch.full(shape, float("nan"), device=DEVICE)


@pytest.mark.parametrize(
    ("dtype", "density", "heads", "block_size", "splits"),
    [
        *((dtype, density, (2, 1), 16, 3) for dtype in DTYPES for density in (None, 0.3)),
        (torch.float32, None, (2, 2), 32, 1),
        (torch.float32, 0.3, (6, 2), 8, 2),
        (torch.float32, None, (3, 1), 8, 1),
    ],
)
def test_decoding(
    dtype: torch.dtype,
    density: float | None,
    heads: tuple[int, int],
    block_size: int,
    splits: int,
) -> None:
    paged = make_paged(
        [1, 1, 1, 0],
        [1, 65, 130, 0],
        heads=heads,
        block_size=block_size,
        dtype=dtype,
        density=density,
        padding_rows=2,
    )
    got = attend(paged, scratch=scratch(paged, splits))
    assert_close(got, paged.wanted, dtype)
    assert_close(attend(paged, reference_paged.paged_attention), paged.wanted, dtype)


@pytest.mark.parametrize(
    ("dtype", "density", "heads", "block_size"),
    [
        *((dtype, density, (2, 1), 16) for dtype in DTYPES for density in (None, 0.3)),
        (torch.float32, None, (6, 2), 32),
        (torch.float32, 0.3, (1, 1), 64),
    ],
)
def test_rows_of_prompts(
    dtype: torch.dtype, density: float | None, heads: tuple[int, int], block_size: int
) -> None:
    """A whole prompt, a chunk of one, a row that decodes and a sequence that waits."""
    paged = make_paged(
        [17, 70, 1, 0],
        [17, 131, 40, 0],
        heads=heads,
        block_size=block_size,
        dtype=dtype,
        density=density,
        padding_rows=3,
    )
    assert_close(attend(paged), paged.wanted, dtype)
    assert_close(attend(paged, reference_paged.paged_attention), paged.wanted, dtype)


@pytest.mark.parametrize("seed", range(6))
def test_random_steps(seed: int) -> None:
    rng = random.Random(seed)
    decodes = seed % 2 == 0
    lengths = [rng.choice((1, 2, 15, 16, 17, 63, 64, 65, 100)) for _ in range(rng.randint(1, 4))]
    paged = make_paged(
        [1 if decodes else rng.randint(0, length) for length in lengths],
        lengths,
        heads=rng.choice([(1, 1), (3, 3), (4, 2), (3, 1)]),
        head_dim=rng.choice([16, 32]),
        block_size=rng.choice([4, 16, 32]),
        density=rng.choice([None, 0.0, 0.1, 0.5, 1.0]),
        padding_rows=rng.randint(0, 5),
        seed=seed,
    )
    options: dict[str, Any] = {"scratch": scratch(paged, rng.randint(1, 5))} if decodes else {}
    assert_close(attend(paged, **options), paged.wanted, torch.float32)


@pytest.mark.parametrize("splits", [5])
def test_a_long_context(splits: int) -> None:
    paged = make_paged([1], [4096], heads=(1, 1), block_size=32)
    assert_close(attend(paged, scratch=scratch(paged, splits)), paged.wanted, torch.float32)


def test_a_chunk_far_into_a_long_prompt() -> None:
    paged = make_paged([37], [1000], heads=(1, 1), block_size=16)
    assert_close(attend(paged), paged.wanted, torch.float32)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_heads_of_the_sizes_that_serve(head_dim: int) -> None:
    for queries in ([1, 1], [3, 20]):
        paged = make_paged(queries, [33, 20], heads=(2, 1), head_dim=head_dim)
        assert_close(attend(paged), paged.wanted, torch.float32)


@pytest.mark.parametrize("num_queries", [1, 5])
def test_a_row_that_sees_nothing_is_zero(num_queries: int) -> None:
    paged = make_paged([num_queries], [70], density=0.0)
    options = [{}] if num_queries > 1 else [{}, {"scratch": scratch(paged, 2)}]
    for chosen in options:
        assert torch.equal(attend(paged, **chosen), torch.zeros_like(paged.q))


@pytest.mark.parametrize("splits", [1, 3])
def test_large_scores_stay_finite(splits: int) -> None:
    paged = make_paged([1, 1], [40, 200], head_dim=16)
    paged.q.mul_(1e4)
    got = attend(paged, scratch=scratch(paged, splits))
    assert_close(got, attend(paged, reference_paged.paged_attention), torch.float32)


def test_bounds_above_what_occurs_change_nothing() -> None:
    """A captured graph is launched with the bounds of its batch, whatever the lengths."""
    paged = make_paged([1, 1], [3, 90])
    narrow = attend(paged)
    wide = attend(paged, max_q=40, max_len=paged.block_tables.shape[1] * paged.block_size)
    assert_close(wide, narrow, torch.float32)
    assert_close(attend(paged, scratch=scratch(paged, 9)), narrow, torch.float32)


@pytest.mark.parametrize("max_q", [1, 8])
def test_a_step_of_padding_alone(max_q: int) -> None:
    paged = make_paged([0, 0], [0, 0], padding_rows=5)
    for splits in (1, 3):
        got = attend(paged, max_q=max_q, scratch=scratch(paged, splits))
        assert torch.equal(got, torch.zeros_like(paged.q))


def test_no_rows_and_no_sequences() -> None:
    assert attend(make_paged([0], [0])).shape == (0, 2, 16)
    empty = make_paged([], [], padding_rows=2)
    assert torch.equal(attend(empty), torch.zeros_like(empty.q))


def test_out_is_written_and_may_have_wide_rows() -> None:
    paged = make_paged([5, 1], [20, 9])
    wide = torch.full((6, 3 * 32), 7.0, device=DEVICE)
    out = wide[:, 32:64].view(6, 2, 16)
    assert attend(paged, out=out) is out
    assert_close(out, paged.wanted, torch.float32)
    assert bool((wide[:, :32] == 7).all()) and bool((wide[:, 64:] == 7).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_len": 1000}, "max_len 1000 does not fit"),
        ({"scratch": torch.zeros(2, 1, 2, 16)}, r"scratch must be \[-1, 1, 2, 20\]"),
        ({"out": torch.zeros(1, 2, 8)}, r"out must be \[1, 2, 16\], got \[1, 2, 8\]"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(make_paged([1], [20]), **change)


def test_heads_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="3 query heads do not share 2 kv heads"):
        paged = make_paged([1], [4], heads=(2, 2))
        paged_attention(
            torch.zeros(1, 3, 16, device=DEVICE),
            paged.keys,
            paged.values,
            paged.block_tables,
            paged.seq_lens,
            paged.cu_seqlens_q,
            block_size=16,
            block_stride=16,
            max_q=1,
            max_len=4,
        )
    with pytest.raises(ValueError, match="head_dim must be a power of two from 16 to 128, got 8"):
        attend(make_paged([1], [4], head_dim=8))
