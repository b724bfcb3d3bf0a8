"""Attention over blocks equals plain attention over each request's own tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from momaserve.core.plan import PlannedSequence, StepPlan
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.paged_attention import PagedAttention
from momaserve.runner.step_entries import StepEntries
from tests.models.factory import make_config
from tests.runner.factory import make_planned, make_storage

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
CONFIG = make_config()  # layers 0 and 2 have depth routers
NUM_ROUTED = 2
BLOCKS = 96


@dataclass
class Sequence:
    """One request's whole q, k, v and which of its tokens the layer takes."""

    planned: PlannedSequence
    q: Tensor
    k: Tensor
    v: Tensor
    taken: Tensor

    @property
    def new(self) -> slice:
        return slice(self.planned.start, self.planned.start + self.planned.num_new_tokens)

    def slots(self, block_size: int) -> Tensor:
        """In the one plain layer; places in the index are the same numbers."""
        return torch.tensor(
            [
                self.planned.blocks[position // block_size] * block_size + position % block_size
                for position in range(len(self.k))
            ]
        )

    def entry_slots(self, block_size: int) -> Tensor:
        """Of all tokens in a depth-routed layer, -1 for those that it skips."""
        numbers = self.taken.cumsum(0) - 1
        table = torch.tensor(self.planned.entry_blocks)
        slots = table[numbers.clamp_min(0) // block_size] * block_size + numbers % block_size
        return torch.where(self.taken, slots, -1)

    def attended(self, *, is_depth_routed: bool) -> Tensor:
        """Plain attention of the new tokens, float64."""
        repeat = HEADS // KV_HEADS
        k, v = (x.double().repeat_interleave(repeat, dim=1) for x in (self.k, self.v))
        rows: list[Tensor] = []
        for position in range(len(self.k))[self.new]:
            visible = [
                other
                for other in range(position + 1)
                if not is_depth_routed or bool(self.taken[other])
            ]
            if is_depth_routed and not self.taken[position]:
                rows.append(torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64))
                continue
            scores = torch.einsum("hk,shk->hs", self.q[position].double(), k[visible])
            weights = (scores * HEAD_DIM**-0.5).softmax(-1)
            rows.append(torch.einsum("hs,shk->hk", weights, v[visible]))
        return torch.stack(rows)


def make_sequences(
    rng: random.Random, spans: list[tuple[int, int]], block_size: int
) -> list[Sequence]:
    """Requests with `start` computed and `count` new tokens, on blocks in random order."""
    free = list(range(BLOCKS))
    rng.shuffle(free)
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    made: list[Sequence] = []
    for number, (start, count) in enumerate(spans):
        total = start + count
        num_blocks = -(-total // block_size) + rng.randint(0, 1)
        blocks = [free.pop() for _ in range(num_blocks)]
        taken = torch.rand(total, generator=generator) < 0.4
        num_entries = int(taken[:start].sum())  # of one depth-routed layer; the other took none
        bound = num_entries + NUM_ROUTED * count
        planned = make_planned(str(number), start, count, blocks)._replace(
            entry_blocks=[free.pop() for _ in range(-(-bound // block_size))],
            num_entries=num_entries,
            max_num_entries=bound,
        )
        made.append(
            Sequence(
                planned,
                torch.randn(total, HEADS, HEAD_DIM, generator=generator),
                torch.randn(total, KV_HEADS, HEAD_DIM, generator=generator),
                torch.randn(total, KV_HEADS, HEAD_DIM, generator=generator),
                taken,
            )
        )
    return made


def poisoned_storage(block_size: int, sequences: list[Sequence], layer: int) -> KVStorage:
    """K/V of the computed tokens in their slots, NaN in all others."""
    storage = make_storage(CONFIG, num_blocks=BLOCKS, block_size=block_size)
    storage.k.fill_(float("nan"))
    storage.v.fill_(float("nan"))
    storage.index.fill_(BLOCKS * block_size - 1)
    for sequence in sequences:
        start = sequence.planned.start
        slots = sequence.slots(block_size)[:start]
        if layer in storage.layout.routed:
            entries = sequence.entry_slots(block_size)[:start]
            storage.index_of(layer)[slots] = entries.int()
            taken = sequence.taken[:start]
            storage.k[entries[taken]] = sequence.k[:start][taken]
            storage.v[entries[taken]] = sequence.v[:start][taken]
        else:
            storage.keys(layer)[slots] = sequence.k[:start]
            storage.values(layer)[slots] = sequence.v[:start]
    return storage


def make_attention(
    sequences: list[Sequence], storage: KVStorage
) -> tuple[PagedAttention, StepEntries]:
    plan = StepPlan(sequences=tuple(sequence.planned for sequence in sequences))
    entries = StepEntries(plan, storage, {})
    return PagedAttention(plan, storage, entries), entries


def run_step(sequences: list[Sequence], storage: KVStorage, layer: int) -> Tensor:
    attention, _ = make_attention(sequences, storage)
    q, k, v, taken = (
        torch.cat([getattr(sequence, name)[sequence.new] for sequence in sequences])
        for name in ("q", "k", "v", "taken")
    )
    return attention(layer, q, k, v, taken if layer in storage.layout.routed else None)


def assert_plain(sequences: list[Sequence], block_size: int, layer: int) -> None:
    storage = poisoned_storage(block_size, sequences, layer)
    out = run_step(sequences, storage, layer)
    wanted = [s.attended(is_depth_routed=layer in storage.layout.routed) for s in sequences]
    assert_close(out.double(), torch.cat(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1], ids=["depth_routed", "plain"])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(8))
def test_random_steps(layer: int, block_size: int, seed: int) -> None:
    """Decodes, first chunks and later chunks mixed, in any order."""
    rng = random.Random(f"{layer} {block_size} {seed}")
    spans = [(0, rng.randint(1, 5)), (rng.randint(1, 6), 1), (rng.randint(1, 4), rng.randint(2, 3))]
    spans += [(rng.randint(0, 3), 1) for _ in range(rng.randint(0, 1))]
    rng.shuffle(spans)
    assert_plain(make_sequences(rng, spans, block_size), block_size, layer)


@pytest.mark.parametrize("layer", [0, 1], ids=["depth_routed", "plain"])
@pytest.mark.parametrize(
    "spans",
    [
        [(0, 1)],
        [(0, 1), (0, 1)],
        [(0, 7)],
        [(3, 4)],
        [(4, 4)],
        [(15, 1), (0, 1), (3, 1)],
        [(1, 2), (0, 9), (8, 1)],
    ],
    ids=str,
)
def test_edges_of_blocks(layer: int, spans: list[tuple[int, int]]) -> None:
    assert_plain(make_sequences(random.Random(1), spans, 4), 4, layer)


def test_writes_its_own_slots_and_no_others() -> None:
    sequences = make_sequences(random.Random(2), [(0, 5), (6, 1)], 4)
    for layer in (1, 2):
        storage = make_storage(CONFIG, num_blocks=BLOCKS, block_size=4)
        run_step(sequences, storage, layer)
        written = torch.zeros(BLOCKS * 4, dtype=torch.bool)
        for sequence in sequences:
            new, places = sequence.new, sequence.slots(4)[sequence.new]
            slots, kept = places, torch.ones(len(places), dtype=torch.bool)
            if layer == 2:
                slots, kept = sequence.entry_slots(4)[new], sequence.taken[new]
                assert torch.equal(storage.index_of(2)[places].long(), slots)
                slots = slots[kept]
            written[slots] = True
            assert torch.equal(storage.k[slots], sequence.k[new][kept])
            assert torch.equal(storage.v[slots], sequence.v[new][kept])
        assert not storage.k[~written].any()
        assert not storage.v[~written].any()
        assert bool((storage.index_of(0) == -1).all())


def test_one_plan_serves_all_layers() -> None:
    sequences = make_sequences(random.Random(3), [(0, 3), (0, 1), (0, 6)], 4)
    storage = make_storage(CONFIG, num_blocks=BLOCKS, block_size=4)
    attention, _ = make_attention(sequences, storage)
    q, k, v = (torch.cat([getattr(s, name) for s in sequences]) for name in ("q", "k", "v"))
    wanted = torch.cat([s.attended(is_depth_routed=False) for s in sequences])
    for layer in (1, 1):
        assert_close(attention(layer, q, k, v, None).double(), wanted, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_number_stays_with_its_own_request() -> None:
    """Decodes of one step share a padded table; the padding must be nobody else's K/V."""
    sequences = make_sequences(random.Random(4), [(9, 1), (2, 1), (0, 1)], 4)
    wanted = run_step(sequences, poisoned_storage(4, sequences, 1), 1)
    sequences[0].v[:] = float("nan")
    got = run_step(sequences, poisoned_storage(4, sequences, 1), 1)
    assert bool(got[0].isnan().all())
    assert torch.equal(got[1:], wanted[1:])
    # The longest one may as well be the healthy one.
    sequences[0].v[:] = 1.0
    sequences[1].v[:] = float("nan")
    got = run_step(sequences, poisoned_storage(4, sequences, 1), 1)
    assert bool(got[1].isnan().all())
    assert bool(got[[0, 2]].isfinite().all())


def test_k_and_v_are_kept_in_the_type_of_the_storage() -> None:
    sequences = make_sequences(random.Random(5), [(0, 4), (0, 1)], 4)
    storage = make_storage(CONFIG, num_blocks=BLOCKS, block_size=4, dtype=torch.bfloat16)
    attention, _ = make_attention(sequences, storage)
    q, k, v = (
        torch.cat([getattr(s, name) for s in sequences]).bfloat16() for name in ("q", "k", "v")
    )
    out = attention(1, q, k, v, None)
    assert out.dtype is torch.bfloat16
    wanted = torch.cat([s.attended(is_depth_routed=False) for s in sequences])
    assert_close(out.double(), wanted, rtol=0.05, atol=0.05)
