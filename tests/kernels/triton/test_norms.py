"""The norms and their residuals against their twins."""

from __future__ import annotations

import pytest
import torch

from momaserve.kernels import reference, reference_norms
from momaserve.kernels.triton import norms
from tests.kernels.triton.device import DEVICE, DTYPES, assert_close, randn

EPS = 1e-5
SHAPES = [(1, 1), (3, 7), (2, 64), (5, 300), (1, 2304)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_three_forms(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, y = randn(*shape, seed=1, dtype=dtype), randn(*shape, seed=2, dtype=dtype)
    weight = randn(shape[1], seed=3, dtype=dtype)
    wanted = reference.rms_norm(x.float(), weight, EPS)
    assert_close(norms.rms_norm(x, weight, EPS), wanted, dtype)
    assert_close(reference_norms.rms_norm(x, weight, EPS), wanted, dtype)

    wanted = x.float() + reference.rms_norm(y.float(), weight, EPS)
    got = norms.add_normed(x, y, weight, EPS)
    assert got.dtype is dtype
    assert_close(got, wanted, dtype)
    assert_close(reference_norms.add_normed(x, y, weight, EPS), wanted, dtype)

    total, normed = norms.normed_sum(x, y, weight, EPS)
    wanted_total, wanted = reference_norms.normed_sum(x, y, weight, EPS)
    assert torch.equal(total, x + y)
    assert torch.equal(wanted_total, total)
    assert_close(normed, reference.rms_norm(total.float(), weight, EPS), dtype)
    assert_close(wanted, normed, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_of_experts_is_float32(dtype: torch.dtype) -> None:
    x, y = randn(3, 48, seed=4, dtype=dtype), randn(3, 48, seed=5)
    weight = randn(48, seed=6, dtype=dtype)
    got = norms.add_normed(x, y, weight, EPS)
    assert got.dtype is dtype
    assert_close(got, reference_norms.add_normed(x, y, weight, EPS), dtype)
    total, _ = norms.normed_sum(x, y, weight, EPS)
    assert torch.equal(total, (x.float() + y).to(dtype))


def test_a_token_without_expert_passes_unchanged() -> None:
    x, weight = randn(2, 40, seed=7), randn(40, seed=8)
    assert torch.equal(norms.add_normed(x, torch.zeros_like(x), weight, EPS), x)


def test_rows_within_wider_rows_in_place() -> None:
    wide, y, weight = randn(4, 100, seed=9), randn(4, 60, seed=10), randn(60, seed=11)
    x, rest = wide[:, :60], wide[:, 60:].clone()
    wanted = reference_norms.add_normed(x, y, weight, EPS)
    assert norms.add_normed(x, y, weight, EPS, out=x) is x
    assert_close(x, wanted, torch.float32)
    assert torch.equal(wide[:, 60:], rest)
    wanted_total, wanted = reference_norms.normed_sum(x, y, weight, EPS)
    norms.normed_sum(x, y, weight, EPS, out_sum=x, out=y)
    assert torch.equal(x, wanted_total)
    assert_close(y, wanted, torch.float32)


def test_rows_do_not_know_their_neighbours() -> None:
    x, weight = randn(3, 33, seed=12), randn(33, seed=13)
    wanted = norms.rms_norm(x, weight, EPS)
    x[1] = float("nan")
    got = norms.rms_norm(x, weight, EPS)
    assert torch.equal(got[[0, 2]], wanted[[0, 2]])


def test_no_rows() -> None:
    x, weight = torch.zeros(0, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    assert norms.rms_norm(x, weight, EPS).shape == (0, 16)
    assert norms.add_normed(x, x, weight, EPS).shape == (0, 16)
    assert norms.normed_sum(x, x, weight, EPS)[1].shape == (0, 16)


def test_arguments_that_do_not_fit() -> None:
    x = torch.zeros(2, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight must be \[16\], got \[8\]"):
        norms.rms_norm(x, torch.ones(8, device=DEVICE), EPS)
    with pytest.raises(ValueError, match=r"y must be \[2, 16\], got \[3, 16\]"):
        norms.add_normed(x, x.new_zeros(3, 16), x[0], EPS)
    with pytest.raises(ValueError, match="gaps in its rows"):
        norms.rms_norm(x.new_zeros(2, 32)[:, ::2], x[0], EPS)
    with pytest.raises(ValueError, match="wider than 16384"):
        norms.rms_norm(x.new_zeros(1, 20000), x[0], EPS)
