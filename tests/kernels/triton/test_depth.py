"""Depth kernels against plain torch: entries, index, lists of rows, the blend."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from momaserve.kernels import reference_depth, reference_routing
from momaserve.kernels.reference_depth import EntryTables, TakenRows, depth_routers
from momaserve.kernels.reference_routing import RouterWeights
from momaserve.kernels.triton import depth
from momaserve.modality import Modality
from tests.kernels.triton.device import DEVICE, DTYPES, assert_close, randint, randn

WIDTH, AUX = 24, 12
BLOCK_SIZE, BLOCK_STRIDE = 4, 12
UNTOUCHED = -99


def integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_tables(lengths: list[int], starts: list[int], num_padding: int) -> EntryTables:
    """Sequences with `lengths` rows in this step after `starts` earlier tokens, half of which have
    entries; then padding rows."""
    count = len(lengths)
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    blocks = max(-(-end // BLOCK_SIZE) for end in ends)
    entry_blocks = max(-(-end // BLOCK_STRIDE) for end in ends)
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(count * (blocks + entry_blocks), generator=generator).int().to(DEVICE)
    sequences = [b for b, length in enumerate(lengths) for _ in range(length)]
    positions = [p for s, e in zip(starts, ends, strict=True) for p in range(s, e)]
    return EntryTables(
        sequences=integers(sequences + [-1] * num_padding),
        positions=integers(positions + [1 << 30] * num_padding),
        cu_seqlens_q=integers([0])
        .repeat(count + 1)
        .index_add(
            0,
            torch.arange(1, count + 1, device=DEVICE),
            integers(lengths).cumsum(0).int(),
        ),
        block_tables=order[: count * blocks].view(count, blocks),
        entry_tables=order[count * blocks :].view(count, entry_blocks),
        num_entries=integers([start // 2 for start in starts]),
        index=integers([UNTOUCHED]).repeat(len(order) * BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        block_stride=BLOCK_STRIDE,
    )


def make_routers(modalities: tuple[Modality, ...] = tuple(Modality)) -> RouterWeights:
    return depth_routers(
        randn(1, WIDTH, seed=1) / WIDTH**0.5,
        randn(AUX, WIDTH, seed=2) / WIDTH**0.5,
        randn(1, AUX, seed=3),
        randn(1, seed=4),
        modalities,
    )


def make_rows(count: int, num_padding: int) -> tuple[Tensor, Tensor, Tensor]:
    modality = randint(0, 2, count, seed=6).to(torch.int8)
    modality[count - num_padding :] = -1
    return randn(count, WIDTH, seed=5), modality, randint(0, 4, count, seed=8).to(torch.int8)


def assert_same(got: TakenRows, wanted: TakenRows) -> None:
    for name in ("taken", "slots", "rows", "places", "count"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    torch.testing.assert_close(got.weight, wanted.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "starts", "num_padding"),
    [
        ([1], [5], 0),
        ([1] * 6, [3, 0, 9, 2, 1, 30], 2),
        ([20, 1, 7], [0, 4, 6], 1),
        ([40, 1, 1, 27, 1], [2, 5, 0, 7, 3], 3),
        ([130], [3], 0),
    ],
)
def test_taken_rows_get_the_next_entries_of_their_sequences(
    lengths: list[int], starts: list[int], num_padding: int
) -> None:
    """Decoding, mixed and chunked steps; sequences that cross the tiles of rows."""
    tables = make_tables(lengths, starts, num_padding)
    twin_tables = deepcopy(tables)
    count = sum(lengths) + num_padding
    x, modality, policy = make_rows(count, num_padding)
    chosen = randint(0, 2, count, 1, seed=9) > 0
    got = depth.take(x, modality, policy, make_routers(), tables, chosen=chosen)
    wanted = reference_depth.take(x, modality, policy, make_routers(), twin_tables, chosen=chosen)
    assert_same(got, wanted)
    assert torch.equal(tables.num_entries, twin_tables.num_entries)
    assert torch.equal(tables.index, twin_tables.index)
    assert int((tables.index != UNTOUCHED).sum()) == sum(lengths)


def test_rows_of_other_modalities_are_always_taken_with_weight_one() -> None:
    tables = make_tables([12], [0], 0)
    x, modality, policy = make_rows(12, 0)
    twin_tables = deepcopy(tables)
    routers = make_routers((Modality.IMAGE,))
    got = depth.take(x, modality, policy, routers, tables)
    assert_same(got, reference_depth.take(x, modality, policy, routers, twin_tables))
    is_text = modality == int(Modality.TEXT)
    assert is_text.any() and not is_text.all()
    assert got.taken[is_text].all() and not got.taken[~is_text].all()
    assert (got.weight[is_text] == 1).all() and (got.weight[~is_text] < 1).all()


def test_a_second_step_appends_to_the_first() -> None:
    """Slots of both steps are those of a single longer one, and never meet."""
    x, modality, _ = make_rows(30, 0)
    policy = torch.full_like(modality, reference_routing.CAUSAL)
    whole, parts = make_tables([30], [0], 0), make_tables([30], [0], 0)
    wanted = depth.take(x, modality, policy, make_routers(), whole)
    slots = []
    for first, end in ((0, 17), (17, 30)):
        mine = slice(first, end)
        step = EntryTables(
            sequences=parts.sequences[mine],
            positions=parts.positions[mine],
            cu_seqlens_q=integers([0, end - first]),
            block_tables=parts.block_tables,
            entry_tables=parts.entry_tables,
            num_entries=parts.num_entries,
            index=parts.index,
            block_size=BLOCK_SIZE,
            block_stride=BLOCK_STRIDE,
        )
        slots.append(depth.take(x[mine], modality[mine], policy[mine], make_routers(), step).slots)
    assert torch.equal(torch.cat(slots), wanted.slots)
    assert torch.equal(parts.index, whole.index)
    assert int(parts.num_entries) == int(wanted.count)
    used = wanted.slots[wanted.slots >= 0]
    assert len(set(used.tolist())) == len(used) > BLOCK_STRIDE


@pytest.mark.parametrize("count", [2, 70])
def test_a_row_without_room_gets_no_entry(count: int) -> None:
    tables = make_tables([count], [0], 0)
    tables.num_entries.fill_(tables.entry_tables.shape[1] * BLOCK_STRIDE - 1)
    x, _, _ = make_rows(count, 0)
    modality = torch.zeros(count, dtype=torch.int8, device=DEVICE)
    got = depth.take(x, modality, modality, make_routers((Modality.IMAGE,)), tables)
    assert (got.slots[:1] >= 0).all() and (got.slots[1:] == -1).all()


def test_no_rows_are_none_taken() -> None:
    tables = make_tables([1], [0], 0)
    empty = integers([])
    nothing = EntryTables(
        sequences=empty,
        positions=empty,
        cu_seqlens_q=integers([0, 0]),
        block_tables=tables.block_tables,
        entry_tables=tables.entry_tables,
        num_entries=tables.num_entries,
        index=tables.index,
        block_size=BLOCK_SIZE,
        block_stride=BLOCK_STRIDE,
    )
    flags = empty.to(torch.int8)
    got = depth.take(randn(0, WIDTH, seed=0), flags, flags, make_routers(), nothing)
    assert int(got.count) == 0 and len(got.rows) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_blend_moves_taken_rows_towards_the_block(dtype: torch.dtype) -> None:
    x, block = randn(5, 1030, seed=10, dtype=dtype), randn(3, 1030, seed=11, dtype=dtype)
    weight = torch.tensor([0.25, 1.0, 0.5, 0.0, 0.75], device=DEVICE)
    places = integers([0, 1, -1, 2, -1])
    wanted = reference_depth.blend(x, block, weight, places)
    got = depth.blend(x, block, weight, places)
    assert_close(got, wanted, dtype)
    assert torch.equal(got[1], block[1]) and torch.equal(got[2], x[2])
    assert depth.blend(x, block, weight, places, out=x) is x
    assert torch.equal(x, got)


def test_weight_one_takes_the_block_exactly_even_beside_huge_numbers() -> None:
    x, block = torch.full((1, 8), 1e30, device=DEVICE), randn(1, 8, seed=12)
    one = torch.ones(1, device=DEVICE)
    assert torch.equal(depth.blend(x, block, one, integers([0])), block)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_fills_with_zero(dtype: torch.dtype) -> None:
    x, rows = randn(4, 33, seed=13, dtype=dtype), integers([2, 0, -1])
    got = depth.gather(x, rows)
    assert torch.equal(got, reference_depth.gather(x, rows))
    assert torch.equal(got[0], x[2]) and not got[2].any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    tables = make_tables([3], [0], 0)
    x, modality, policy = make_rows(3, 0)
    with pytest.raises(ValueError, match=r"sequences must be .*int32 \[2\]"):
        depth.take(x[:2], modality[:2], policy[:2], make_routers(), tables)
    with pytest.raises(ValueError, match="chosen must be"):
        chosen = torch.zeros(3, dtype=torch.bool, device=DEVICE)
        depth.take(x, modality, policy, make_routers(), tables, chosen=chosen)
    with pytest.raises(ValueError, match="block must be"):
        depth.blend(x, x[:, :8], torch.ones(3, device=DEVICE), integers([0, 1, 2]))
