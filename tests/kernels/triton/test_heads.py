"""Norm, rotation and placement of heads against their twin, all of KV memory included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from momaserve.kernels import reference, reference_paged
from momaserve.kernels.triton.heads import place_heads
from tests.kernels.triton.device import DEVICE, DTYPES, assert_close, randn

NUM_SLOTS = 24


def memory(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Distinct numbers, so that a stray write shows."""
    size = NUM_SLOTS * num_kv_heads * head_dim
    return (torch.arange(size, device=DEVICE) % 1000).to(dtype).view(NUM_SLOTS, num_kv_heads, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((2, 2), 16), ((6, 2), 32), ((5, 1), 64), ((3, 3), 128)]
)
def test_heads_and_their_places(
    dtype: torch.dtype, normed: bool, heads: tuple[int, int], head_dim: int
) -> None:
    num_heads, num_kv_heads = heads
    slots = torch.tensor([3, -1, 0, 19, -1, 7], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([0, 5, 11, 39, 2, 12], device=DEVICE)
    table = reference.rope_table(40, head_dim, 10000.0).to(DEVICE)
    qkv = randn(6, (num_heads + 2 * num_kv_heads) * head_dim, seed=1, dtype=dtype)
    weight = bias = None
    if normed:
        weight = randn(num_heads + num_kv_heads, head_dim, seed=2, dtype=dtype)
        bias = randn(num_heads + num_kv_heads, head_dim, seed=3, dtype=dtype)
    results = []
    for function in (place_heads, reference_paged.place_heads):
        keys, values = (memory(num_kv_heads, head_dim, dtype) for _ in range(2))
        q = function(qkv, weight, bias, table, positions, slots, keys, values, layer_offset=4)
        results.append((q, keys, values))
    (q, keys, values), (wanted_q, wanted_keys, wanted_values) = results
    assert q.shape == (6, num_heads, head_dim)
    assert_close(q, wanted_q, dtype)
    assert_close(keys, wanted_keys, dtype)
    assert torch.equal(values, wanted_values)
    kept = torch.tensor([4, 7, 11, 23], device=DEVICE)
    others = torch.ones(NUM_SLOTS, dtype=torch.bool, device=DEVICE)
    others[kept] = False
    assert torch.equal(keys[others], memory(num_kv_heads, head_dim, dtype)[others])
    assert not torch.equal(keys[kept], memory(num_kv_heads, head_dim, dtype)[kept])


def test_the_twin_is_the_layers_own_arithmetic() -> None:
    """As `layers.attention.SelfAttention.project` has it."""
    weight, bias = randn(6, 16, seed=2), randn(6, 16, seed=3)
    table = reference.rope_table(9, 16, 10000.0).to(DEVICE)
    positions = torch.tensor([8, 0, 3], device=DEVICE)
    slots = torch.arange(3, dtype=torch.int32, device=DEVICE)
    qkv = randn(3, 8 * 16, seed=4)
    keys, values = (memory(2, 16, torch.float32) for _ in range(2))
    got = reference_paged.place_heads(qkv, weight, bias, table, positions, slots, keys, values)
    q, k, v = torch.split(qkv.view(3, 8, 16), [4, 2, 2], dim=1)
    angles = table[positions]
    q = reference.apply_rope(reference.head_layer_norm(q, weight[:4], bias[:4]), angles)
    k = reference.apply_rope(reference.head_layer_norm(k, weight[4:], bias[4:]), angles)
    assert_close(got, q, torch.float32)
    assert_close(keys[:3], k, torch.float32)
    assert torch.equal(values[:3], v)


def test_padding_rows_come_out_finite_whatever_their_position() -> None:
    table = reference.rope_table(8, 16, 10000.0).to(DEVICE)
    positions = torch.tensor([-1, 7, 10**9], device=DEVICE)
    slots = torch.tensor([-1, 2, -1], dtype=torch.int32, device=DEVICE)
    keys, values = (memory(1, 16, torch.float32) for _ in range(2))
    qkv = randn(3, 4 * 16, seed=5)
    q = place_heads(qkv, None, None, table, positions, slots, keys, values)
    assert bool(torch.isfinite(q).all())
    assert torch.equal(keys[3:], memory(1, 16, torch.float32)[3:])


def test_rows_within_wider_rows_and_a_given_output() -> None:
    table = reference.rope_table(8, 16, 10000.0).to(DEVICE)
    positions = torch.tensor([3, 4], device=DEVICE)
    slots = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    wide = randn(2, 5 * 16, seed=6)
    out = torch.empty(2, 2, 16, device=DEVICE)
    results = []
    for qkv in (wide[:, : 4 * 16], wide[:, : 4 * 16].contiguous()):
        keys, values = (memory(1, 16, torch.float32) for _ in range(2))
        q = place_heads(qkv, None, None, table, positions, slots, keys, values, out=out)
        assert q is out
        results.append((q.clone(), keys, values))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


def test_no_rows() -> None:
    table = reference.rope_table(8, 16, 10000.0).to(DEVICE)
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    keys, values = (memory(1, 16, torch.float32) for _ in range(2))
    qkv = torch.zeros(0, 64, device=DEVICE)
    assert place_heads(qkv, None, None, table, none, none, keys, values).shape == (0, 2, 16)
    assert torch.equal(keys, memory(1, 16, torch.float32))


def test_arguments_that_do_not_fit() -> None:
    table = reference.rope_table(8, 16, 10000.0).to(DEVICE)
    one = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    keys, values = (memory(2, 16, torch.float32) for _ in range(2))
    with pytest.raises(ValueError, match=r"qkv \[1, 64\] has no query heads beside 2 kv heads"):
        place_heads(torch.zeros(1, 64, device=DEVICE), None, None, table, one, one, keys, values)
    qkv = torch.zeros(1, 96, device=DEVICE)
    with pytest.raises(ValueError, match=r"slots must be \[1\], got \[2\]"):
        place_heads(qkv, None, None, table, one, one.repeat(2), keys, values)
    with pytest.raises(ValueError, match="come together"):
        place_heads(qkv, torch.zeros(4, 16, device=DEVICE), None, table, one, one, keys, values)
    with pytest.raises(ValueError, match=r"table must be \[-1, 2, 8\]"):
        place_heads(qkv, None, None, table[:, :, :4], one, one, keys, values)
