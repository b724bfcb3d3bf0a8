"""Every CPU kernel against its twin in plain torch, for float32 and bfloat16 weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from momaserve.kernels import reference
from momaserve.kernels.cpu import attention, experts, glue, jit, linear, routing
from momaserve.kernels.cpu.scalar import exp32, narrow, sigmoid, widen

TOLERANCE = 2e-5
DTYPES = [torch.float32, torch.bfloat16]
Array = NDArray[Any]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Array]:
    """A weight as its twin gets it, and as the kernel does."""
    if dtype is torch.float32:
        return weight, weight.numpy()
    rounded = weight.to(torch.bfloat16)
    return rounded.float(), rounded.view(torch.int16).numpy().view(np.uint16)


def assert_close(got: Array, wanted: Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=TOLERANCE, atol=TOLERANCE)


# --- single numbers ------------------------------------------------------------------------


@njit
def _map(x: Any, out: Any, which: int) -> None:
    for i in range(len(x)):
        out[i] = exp32(x[i]) if which == 0 else sigmoid(x[i])


@njit
def _round_trip(x: Any, half: Any, out: Any) -> None:
    for i in range(len(x)):
        half[i] = narrow(x[i], half)
        out[i] = widen(half[i])


def test_exponential() -> None:
    x = np.linspace(-87, 88, 100_001, dtype=np.float32)
    out = np.empty_like(x)
    _map(x, out, 0)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(out / exact - 1).max() < 4e-7


@pytest.mark.parametrize(("x", "low", "high"), [(-1e30, 0, 2e-38), (-np.inf, 0, 2e-38)])
def test_exponential_of_very_little_is_nearly_nothing(x: float, low: float, high: float) -> None:
    out = np.empty(1, np.float32)
    _map(np.array([x], np.float32), out, 0)
    assert low <= out[0] <= high


def test_sigmoid() -> None:
    x = np.concatenate([np.linspace(-80, 80, 10_001), [1e30, -1e30]]).astype(np.float32)
    out = np.empty_like(x)
    _map(x, out, 1)
    assert_close(out, torch.from_numpy(x).sigmoid())


def test_bfloat16_rounds_as_torch_does() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate([bits.view(np.float32), np.array([0, -0.0, np.inf, -np.inf], np.float32)])
    half, out = np.empty(len(x), np.uint16), np.empty(len(x), np.float32)
    _round_trip(x, half, out)
    wanted = torch.from_numpy(x).to(torch.bfloat16).float()
    torch.testing.assert_close(torch.from_numpy(out), wanted, rtol=0, atol=0, equal_nan=True)


# --- matrices ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiply", [linear.linear, linear.linear_threaded])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 4, 7, 8, 13, 16, 131])
@pytest.mark.parametrize("num_outputs", [24, 32, 70])
def test_linear(multiply: Any, dtype: torch.dtype, num_rows: int, num_outputs: int) -> None:
    x, (w, _) = randn(num_rows + 3, 37), stored(randn(num_outputs, 37, seed=1), dtype)
    rows = torch.randperm(num_rows + 3, generator=torch.Generator().manual_seed(2))[:num_rows]
    packed = linear.pack(w.to(dtype))
    out = np.full((num_rows, linear.padded(num_outputs)), np.nan, np.float32)
    multiply(x.numpy(), rows.numpy(), packed, out)
    assert_close(out[:, :num_outputs], F.linear(x[rows], w))
    assert not out[:, num_outputs:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_product_does_not_depend_on_its_mates(dtype: torch.dtype) -> None:
    num_rows = 135  # enough for a tile to be widened first
    x, packed = randn(num_rows, 100).numpy(), linear.pack(randn(64, 100, seed=1).to(dtype))
    together = np.empty((num_rows, 64), np.float32)
    linear.linear(x, np.arange(num_rows), packed, together)
    for row in range(num_rows):
        alone = np.empty((1, 64), np.float32)
        linear.linear(x, np.array([row]), packed, alone)
        assert (alone[0] == together[row]).all()


def test_a_kernel_and_its_threaded_twin_do_not_share_a_cache_file(tmp_path: Path) -> None:
    """They did once: whichever was compiled first served as both, for good.

    Nor do those of other sources: a change of `tile.py` alone was not noticed once.
    """
    script = (
        "import numpy as np, torch\n"
        "from momaserve.kernels.cpu import linear\n"
        "packed, out = linear.pack(torch.ones(32, 4)), np.empty((1, 32), np.float32)\n"
        "for multiply in (linear.linear, linear.linear_threaded):\n"
        "    multiply(np.ones((1, 4), np.float32), np.arange(1), packed, out)\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    names = [path.name for path in tmp_path.rglob("*.nbi")]
    assert sum(name.startswith(f"linear._linear_{jit._SOURCES}-") for name in names) == 1
    assert sum(name.startswith(f"linear._linear_threaded_{jit._SOURCES}-") for name in names) == 1


def test_packing_keeps_bfloat16_that_is_stored_as_float32() -> None:
    wide = randn(40, 6)
    exact = wide.bfloat16().float()
    assert linear.pack(exact).dtype == np.uint32
    assert (linear.pack(exact) == linear.pack(wide.bfloat16())).all()
    assert linear.pack(wide).dtype == np.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_embed(dtype: torch.dtype) -> None:
    table, kernel_table = stored(randn(9, 5), dtype)
    ids = np.array([3, 0, 8, 3])
    out = np.empty((4, 5), np.float32)
    glue.embed(ids, kernel_table, out)
    assert_close(out, table[torch.from_numpy(ids)])


# --- glue ----------------------------------------------------------------------------------


def test_norms() -> None:
    x, y, weight, eps = randn(4, 19), randn(4, 19, seed=1), randn(19, seed=2), 1e-5
    out = np.empty((4, 19), np.float32)
    glue.rms_norm(x.numpy(), weight.numpy(), np.float32(eps), out)
    assert_close(out, reference.rms_norm(x, weight, eps))
    glue.add_rms_norm(x.numpy(), y.numpy(), weight.numpy(), np.float32(eps), out)
    assert_close(out, x + reference.rms_norm(y, weight, eps))


def test_the_norm_of_nothing_is_nothing() -> None:
    x, zero = randn(2, 8), np.zeros((2, 8), np.float32)
    out = np.empty((2, 8), np.float32)
    glue.add_rms_norm(x.numpy(), zero, np.ones(8, np.float32), np.float32(1e-5), out)
    assert_close(out, x)


def test_sum() -> None:
    x, y = randn(3, 5), randn(3, 8, seed=1)
    out = np.empty((3, 5), np.float32)
    glue.add(x.numpy(), y.numpy(), out)
    assert_close(out, x + y[:, :5])


def test_blend() -> None:
    x, y, rows = randn(5, 6), randn(3, 6, seed=1), torch.tensor([4, 0, 2])
    weight = torch.tensor([0.25, 1.0, 0.0])
    out = x.numpy().copy()
    glue.blend(out, rows.numpy(), y.numpy(), weight.numpy())
    wanted = x.clone()
    wanted[rows] += weight.unsqueeze(1) * (y - x[rows])
    assert_close(out, wanted)
    assert (out[0] == y[1].numpy()).all()  # exactly, not within rounding
    assert (out[[1, 3]] == x[[1, 3]].numpy()).all()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 6), (3, 1, 10)])
def test_heads_are_normed_and_rotated(heads: int, kv_heads: int, head_dim: int) -> None:
    both, width = heads + kv_heads, (heads + 2 * kv_heads) * head_dim
    qkv = randn(5, width)
    weight, bias = randn(both, head_dim, seed=1), randn(both, head_dim, seed=2)
    positions = torch.tensor([0, 7, 3, 11, 1])
    table = reference.rope_table(12, head_dim, 10000.0)
    out = qkv.numpy().copy()
    glue.norm_heads(out, weight.numpy(), bias.numpy(), head_dim)
    glue.rotate(out, table.numpy(), positions.numpy(), both)
    parts = qkv.view(5, -1, head_dim)
    normed = reference.head_layer_norm(parts[:, :both], weight, bias)
    rotated = reference.apply_rope(normed, table[positions])
    assert_close(out, torch.cat((rotated, parts[:, both:]), dim=1).flatten(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_go_to_their_slots(dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim = 3, 2, 4
    qkv = randn(3, (heads + 2 * kv_heads) * head_dim)
    number = np.float32 if dtype is torch.float32 else np.uint16
    keys, values = (np.zeros((10, kv_heads, head_dim), number) for _ in range(2))
    slots = np.array([7, 0, 4])
    attention.store(qkv.numpy(), heads * head_dim, slots, keys, values)
    parts = qkv.view(3, -1, head_dim)
    for memory, first in ((keys, heads), (values, heads + kv_heads)):
        _, wanted = stored(parts[:, first : first + kv_heads].contiguous(), dtype)
        assert (memory[slots] == wanted).all()
        assert not memory[[1, 2, 3, 5, 6, 8, 9]].any()


# --- attention -----------------------------------------------------------------------------


def list_slots(
    rows: Array, positions: Array, tables: Array, block_size: int, stride: int, index: Array
) -> tuple[Array, Array]:
    most = int(positions[rows[:, 0]].max()) + 1
    slots, counts = np.full((len(rows), most), 10**6, np.int32), np.empty(len(rows), np.int64)
    attention.list_slots(rows, positions, tables, block_size, stride, index, slots, counts)
    return slots, counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attend", [attention.attend, attention.attend_threaded])
@pytest.mark.parametrize("is_depth_routed", [False, True])
@pytest.mark.parametrize(("kv_heads", "num_parts"), [(2, 1), (2, 2), (4, 3)])
@pytest.mark.parametrize("head_dim", [6, 32, 40])
def test_attention_over_blocks(
    attend: Any,
    dtype: torch.dtype,
    is_depth_routed: bool,
    kv_heads: int,
    num_parts: int,
    head_dim: int,
) -> None:
    heads, block_size = 4, 4
    stride, offset = 3 * block_size, block_size  # of the second of three layers
    lengths = [1, 4, 9, 6]
    k, kernel_k = stored(randn(144, kv_heads, head_dim), dtype)
    v, kernel_v = stored(randn(144, kv_heads, head_dim, seed=1), dtype)
    tables = np.array([[5, 0, 0], [2, 0, 0], [7, 1, 10], [3, 11, 0]], np.int32)
    q = randn(5, (heads + 2 * kv_heads) * head_dim, seed=2)
    rows = np.array([[0, 0], [1, 1], [2, 2], [4, 3]])  # row 3 is somebody else's
    positions = np.array([lengths[0] - 1, lengths[1] - 1, lengths[2] - 1, 99, lengths[3] - 1])
    index = np.empty(0, np.int32)
    if is_depth_routed:
        offset = 0
        dice = np.random.default_rng(0)
        index = np.where(dice.random(48) < 0.5, dice.permutation(144)[:48], -1).astype(np.int32)
        for _, sequence in rows:  # a row that is attended was taken itself
            last = lengths[sequence] - 1
            place = tables[sequence, last // block_size] * block_size + last % block_size
            index[place] = 100 + sequence
    out = np.full((5, heads * head_dim), 7.0, np.float32)
    seen = list_slots(rows, positions, tables, block_size, stride, index)
    attend(q.numpy(), kernel_k[offset:], kernel_v[offset:], rows, *seen, num_parts, out)
    assert (out[3] == 7).all()
    for t, sequence in rows:
        tokens = np.arange(lengths[sequence])
        blocks = tables[sequence, tokens // block_size]
        slots = blocks * stride + offset + tokens % block_size
        if is_depth_routed:
            slots = index[blocks * block_size + tokens % block_size]
            slots = slots[slots >= 0]
        wanted = reference.attend(
            q[t, : heads * head_dim].view(1, 1, heads, head_dim),
            k[slots].unsqueeze(0),
            v[slots].unsqueeze(0),
            None,
        )
        assert_close(out[t], wanted.flatten())


def test_what_is_not_finite_stays_with_its_own_sequence() -> None:
    keys, values = (randn(8, 1, 4, seed=i).numpy() for i in range(2))
    keys[0], values[1] = np.nan, np.inf
    rows, positions = np.array([[0, 0], [1, 1]]), np.array([3, 3])
    tables = np.array([[0], [1]], np.int32)
    out = np.empty((2, 4), np.float32)
    q = randn(2, 4).numpy()
    seen = list_slots(rows, positions, tables, 4, 4, np.empty(0, np.int32))
    attention.attend(q, keys, values, rows, *seen, 1, out)
    assert not np.isfinite(out[0]).all()
    assert np.isfinite(out[1]).all()


def test_a_skipped_key_that_is_not_finite_is_never_seen() -> None:
    keys, values = (randn(4, 1, 4, seed=i).numpy() for i in range(2))
    keys[1] = values[1] = np.nan
    index = np.array([0, -1, 2, 3], np.int32)
    out = np.empty((1, 4), np.float32)
    rows, tables = np.array([[0, 0]]), np.array([[0]], np.int32)
    q = randn(1, 4).numpy()
    seen = list_slots(rows, np.array([3]), tables, 4, 4, index)
    attention.attend(q, keys, values, rows, *seen, 1, out)
    assert np.isfinite(out).all()


def test_taken_rows_get_slots_behind_those_given_out() -> None:
    """Blocks of three slots; sequence 0 has four entries, sequence 1 none."""
    sequences, places = np.array([0, 0, 1, 0, 1]), np.array([8, 9, 2, 10, 3])
    tables = np.array([[7, 4, 5], [6, 0, 0]])
    counts, index = np.array([4, 0]), np.full(12, 99, np.int32)
    slots = np.empty(5, np.int64)
    taken = np.array([True, False, True, True, False])
    attention.append(taken, sequences, tables, 3, places, counts, index, slots)
    assert slots.tolist() == [4 * 3 + 1, -1, 6 * 3, 4 * 3 + 2, -1]
    assert counts.tolist() == [6, 1]
    assert index.tolist() == [99, 99, 18, -1, 99, 99, 99, 99, 13, -1, 14, 99]
    attention.append(np.ones(5, np.bool_), sequences, tables, 3, places, counts, index, slots)
    assert slots.tolist() == [15, 16, 19, 17, 20]


# --- routing and experts -------------------------------------------------------------------


def test_routers() -> None:
    x, main, fc1, fc2 = (
        randn(5, 12),
        randn(4, 12, seed=1),
        randn(8, 12, seed=2),
        randn(4, 8, seed=3),
    )
    rows = np.array([4, 0, 2])
    logits, weights, aux = (np.empty((3, 4), np.float32) for _ in range(3))
    routing.scores(x.numpy(), rows, main.numpy(), logits, weights)
    assert_close(logits, F.linear(x[rows], main))
    assert_close(weights, torch.from_numpy(logits).sigmoid())
    for threads in (False, True):
        routing.auxiliary(x.numpy(), rows, linear.pack(fc1), fc2.numpy(), threads, aux)
        assert_close(aux, reference.router_hidden(x[rows], fc1, fc2))
    selected = np.zeros((3, 4), np.bool_)
    thresholds = np.array([0.0, 0.5, -np.inf, np.inf], np.float32)
    routing.select(aux, thresholds, np.array([0, 1, 1, 1, 1], np.int8), rows, 1, selected)
    expected = aux > thresholds
    expected[1] = False  # row 0 of the batch has another policy
    assert (selected == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 13, 40])
@pytest.mark.parametrize("inner", [10, 16, 53])
def test_routed_experts(dtype: torch.dtype, threads: bool, num_tokens: int, inner: int) -> None:
    num_experts, width = 4, 12
    u = randn(num_tokens + 2, width)
    rows = np.arange(num_tokens + 2)[::-1][:num_tokens].copy()
    gate, _ = stored(randn(num_experts, inner, width, seed=1), dtype)
    up, _ = stored(randn(num_experts, inner, width, seed=2), dtype)
    down, _ = stored(randn(num_experts, width, inner, seed=3), dtype)
    weights = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(4))
    selected = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(5)) < 0.4
    selected[:, 2] = False  # an expert that nobody wants
    packed = experts.pack_gate_up(gate.to(dtype), up.to(dtype)), experts.pack_down(down.to(dtype))
    packed[0][2], packed[1][2] = 0x7FC07FC0, 0x7FC07FC0  # NaN, or huge: it must not be read
    out = np.ones((num_tokens + 2, width), np.float32)
    experts.routed_experts(
        u.numpy(), rows, selected.numpy(), weights.numpy(), *packed, threads, out
    )
    wanted = torch.ones(num_tokens + 2, width)
    wanted[rows] += reference.routed_experts(u[rows], selected, weights, gate, up, down)
    torch.testing.assert_close(torch.from_numpy(out), wanted, rtol=1e-4, atol=1e-4)
