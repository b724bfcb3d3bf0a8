"""Expert kernels against plain torch, both ways: empty experts, idle rows, odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from momaserve.kernels import reference, reference_experts
from momaserve.kernels.reference_experts import ExpertWeights
from momaserve.kernels.reference_routing import Pairs
from momaserve.kernels.triton import experts
from momaserve.kernels.triton.experts import DirectTiles, GroupedTiles
from tests.kernels.triton.device import DEVICE, DTYPES, assert_close, randint, randn

SMALL_DIRECT = DirectTiles(16, 32, 4, 16, 16, 4)
SMALL_GROUPED = GroupedTiles(16, 32, 16, 4, 2, 32, 16, 4, 2, 2)
Way = Callable[[Tensor, Pairs, ExpertWeights, Tensor, bool], Tensor]


def direct(u: Tensor, pairs: Pairs, weights: ExpertWeights, out: Tensor, add: bool) -> Tensor:
    return experts.direct(u, pairs, weights, SMALL_DIRECT, out, add)


def grouped(u: Tensor, pairs: Pairs, weights: ExpertWeights, out: Tensor, add: bool) -> Tensor:
    return experts.grouped(u, pairs, weights, SMALL_GROUPED, out, add)


WAYS = [direct, grouped]


def make_weights(
    num_experts: int, width: int, inner: int, dtype: torch.dtype, *, multiple: int = 16
) -> ExpertWeights:
    def normal(*shape: int, seed: int) -> Tensor:
        scale: float = shape[-1] ** -0.5
        return randn(*shape, seed=seed, dtype=dtype) * scale

    return ExpertWeights.padded(
        normal(num_experts, inner, width, seed=1),
        normal(num_experts, inner, width, seed=2),
        normal(num_experts, width, inner, seed=3),
        multiple=multiple,
    )


def make_pairs(selected: Tensor, max_group: int) -> Pairs:
    """Lists with numbers behind the last pair that nobody may use."""
    scale = randn(*selected.shape, seed=4).sigmoid()
    pairs = Pairs.of(selected, scale, max_group, None)
    count = int(pairs.offsets[-1])
    pairs.tokens[count:], pairs.weights[count:] = 1 << 30, torch.nan
    return pairs


def draw_selected(rows: int, num_experts: int, seed: int) -> Tensor:
    return randint(0, 3, rows, num_experts, seed=seed) == 0


def run(way: Way, u: Tensor, pairs: Pairs, weights: ExpertWeights) -> Tensor:
    out = torch.full(u.shape, torch.nan, device=DEVICE)
    return way(u, pairs, weights, out, False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_experts", "width", "inner", "multiple"),
    [(1, 4, 32, 21, 16), (3, 3, 40, 21, 1), (19, 2, 48, 33, 32), (40, 3, 33, 16, 16)],
)
def test_experts_are_the_weighted_sum_of_their_pairs(
    way: Way,
    dtype: torch.dtype,
    rows: int,
    num_experts: int,
    width: int,
    inner: int,
    multiple: int,
) -> None:
    weights = make_weights(num_experts, width, inner, dtype, multiple=multiple)
    pairs = make_pairs(draw_selected(rows, num_experts, seed=rows), num_experts)
    u = randn(rows, width, seed=5, dtype=dtype)
    wanted = reference_experts.experts(u, pairs, weights)
    assert_close(run(way, u, pairs, weights), wanted, dtype, factor=2)


@pytest.mark.parametrize("way", WAYS)
def test_experts_without_pairs_are_not_read_and_idle_rows_get_zero(way: Way) -> None:
    selected = draw_selected(6, 4, seed=6)
    selected[:, 0], selected[:, 2], selected[3] = False, False, False
    weights, pairs = make_weights(4, 32, 16, torch.float32), make_pairs(selected, 4)
    u = randn(6, 32, seed=7)
    wanted = reference_experts.experts(u, pairs, weights)
    for idle in (0, 2):
        for part in (weights.gate, weights.up, weights.down):
            part[idle] = torch.nan
    u[3] = torch.nan
    got = run(way, u, pairs, weights)
    assert_close(got, wanted, torch.float32)
    assert torch.equal(got[3], torch.zeros(32, device=DEVICE))


@pytest.mark.parametrize("way", WAYS)
def test_all_rows_of_one_expert_and_all_experts_of_one_row(way: Way) -> None:
    selected = torch.zeros(21, 3, dtype=torch.bool, device=DEVICE)
    selected[:, 1], selected[4] = True, True
    weights, pairs = make_weights(3, 32, 16, torch.float32), make_pairs(selected, 3)
    u = randn(21, 32, seed=8)
    wanted = reference_experts.experts(u, pairs, weights)
    assert_close(run(way, u, pairs, weights), wanted, torch.float32)


@pytest.mark.parametrize("way", WAYS)
def test_no_pairs_at_all_are_zero(way: Way) -> None:
    selected = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    weights, pairs = make_weights(3, 32, 16, torch.float32), make_pairs(selected, 3)
    got = run(way, randn(2, 32, seed=9), pairs, weights)
    assert torch.equal(got, torch.zeros(2, 32, device=DEVICE))


@pytest.mark.parametrize("way", WAYS)
def test_what_the_padding_of_gate_and_up_holds_does_not_matter(way: Way) -> None:
    weights = make_weights(2, 32, 19, torch.float32, multiple=16)
    pairs = make_pairs(draw_selected(5, 2, seed=10), 2)
    u = randn(5, 32, seed=11)
    wanted = run(way, u, pairs, weights)
    weights.gate[:, 19:], weights.up[:, 19:] = torch.nan, 1e30
    assert torch.equal(run(way, u, pairs, weights), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_groups_of_two_sizes_add_up(way: Way) -> None:
    """Experts 0 to 2 have one size, 3 and 4 another: two runs over one list of pairs."""
    pairs = make_pairs(draw_selected(7, 5, seed=12), 5)
    small = make_weights(3, 32, 16, torch.float32)
    large = replace(make_weights(2, 32, 40, torch.float32), first=3)
    u = randn(7, 32, seed=13)
    wanted = reference_experts.experts(u, pairs, small)
    wanted = reference_experts.experts(u, pairs, large, out=wanted, accumulate=True)
    got = way(u, pairs, large, run(way, u, pairs, small), True)
    assert_close(got, wanted, torch.float32)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_launcher_takes_either_way(rows: int) -> None:
    assert experts.use_direct(1) and not experts.use_direct(5)
    weights = make_weights(2, 16, 16, torch.float32)
    pairs = make_pairs(draw_selected(rows, 2, seed=14), 2)
    wide = randn(rows, 20, seed=15)
    u = wide[:, :16]
    wanted = reference_experts.experts(u, pairs, weights)
    assert_close(experts.experts(u, pairs, weights), wanted, torch.float32)
    out = torch.full((rows, 16), torch.nan, device=DEVICE)
    assert experts.experts(u, pairs, weights, out=out) is out
    assert_close(out, wanted, torch.float32)


def test_no_rows_are_no_result() -> None:
    weights = make_weights(2, 16, 16, torch.float32)
    pairs = Pairs.empty(0, 2, 2, torch.device(DEVICE))
    assert experts.experts(randn(0, 16, seed=0), pairs, weights).shape == (0, 16)


@pytest.mark.parametrize(("pairs", "num_experts", "rows"), [(1, 8, 16), (64, 8, 16), (65, 3, 32)])
def test_row_tiles_suffice_in_the_worst_case(pairs: int, num_experts: int, rows: int) -> None:
    """All but one expert have a single pair, the last one all others."""
    alone = min(pairs, num_experts) - 1
    worst = alone + -(-(pairs - alone) // rows)
    assert worst <= experts.most_row_tiles(pairs, num_experts, rows)


def test_shapes_that_do_not_fit_are_refused() -> None:
    weights = make_weights(2, 16, 16, torch.float32)
    pairs = make_pairs(draw_selected(3, 2, seed=16), 2)
    u = randn(3, 16, seed=17)
    with pytest.raises(ValueError, match=r"u must be torch.float32 \[3, 16\]"):
        experts.experts(u.half(), pairs, weights)
    with pytest.raises(ValueError, match="do not hold 3 rows and experts 1 to 3"):
        experts.experts(u, pairs, replace(weights, first=1))
    with pytest.raises(ValueError, match="out must be contiguous float32"):
        experts.experts(u, pairs, weights, out=torch.empty(3, 16, device=DEVICE).half())
    with pytest.raises(ValueError, match="down must be"):
        experts.experts(u, pairs, replace(weights, down=weights.down[:, :, :8]))


def test_the_twin_computes_what_the_layers_do() -> None:
    selected = draw_selected(9, 3, seed=18)
    weights = make_weights(3, 16, 24, torch.float32, multiple=32)
    scale = randn(9, 3, seed=19).sigmoid()
    u = randn(9, 16, seed=20)
    gate, up, down = weights.gate[:, :24], weights.up[:, :24], weights.down[:, :, :24]
    wanted = reference.routed_experts(u, selected, scale, gate, up, down)
    got = reference_experts.experts(u, Pairs.of(selected, scale, 3, None), weights)
    assert_close(got, wanted, torch.float32)
