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
from tests.models.factory import make_config
from tests.runner.factory import make_planned, make_storage

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
CONFIG = make_config()  # layers 0 and 2 have depth routers
BLOCKS = 24


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
        return torch.tensor(
            [
                self.planned.blocks[position // block_size] * block_size + position % block_size
                for position in range(len(self.k))
            ]
        )

    def attended(self, *, is_depth_routed: bool) -> Tensor:
        """Plain attention of the new tokens, float64."""
        repeat = HEADS // KV_HEADS
        k, v = (x.double().repeat_interleave(repeat, dim=1) for x in (self.k, self.v))
        rows: list[Tensor] = []
        for position in range(len(self.k))[self.new]:
            visible = [
                other
                for other in range(position + 1)
                if not is_depth_routed or bool(self.taken[other]) or other == position
            ]
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
        made.append(
            Sequence(
                make_planned(str(number), start, count, blocks),
                torch.randn(total, HEADS, HEAD_DIM, generator=generator),
                torch.randn(total, KV_HEADS, HEAD_DIM, generator=generator),
                torch.randn(total, KV_HEADS, HEAD_DIM, generator=generator),
                torch.rand(total, generator=generator) < 0.4,
            )
        )
    return made


def poisoned_storage(block_size: int, sequences: list[Sequence], layer: int) -> KVStorage:
    """K/V of the computed tokens in their slots, NaN in all others."""
    storage = make_storage(CONFIG, num_blocks=BLOCKS, block_size=block_size)
    storage.k.fill_(float("nan"))
    storage.v.fill_(float("nan"))
    for taken in storage.taken.values():
        taken.fill_(True)
    for sequence in sequences:
        start = sequence.planned.start
        slots = sequence.slots(block_size)[:start]
        storage.k[layer, slots] = sequence.k[:start]
        storage.v[layer, slots] = sequence.v[:start]
        if layer in storage.taken:
            storage.taken[layer][slots] = sequence.taken[:start]
    return storage


def run_step(sequences: list[Sequence], storage: KVStorage, layer: int) -> Tensor:
    plan = StepPlan(sequences=tuple(sequence.planned for sequence in sequences))
    attention = PagedAttention(plan, storage)
    q, k, v, taken = (
        torch.cat([getattr(sequence, name)[sequence.new] for sequence in sequences])
        for name in ("q", "k", "v", "taken")
    )
    return attention(layer, q, k, v, taken if layer in storage.taken else None)


def assert_plain(sequences: list[Sequence], block_size: int, layer: int) -> None:
    storage = poisoned_storage(block_size, sequences, layer)
    out = run_step(sequences, storage, layer)
    wanted = [s.attended(is_depth_routed=layer in storage.taken) for s in sequences]
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
    while sum(-(-(a + b) // block_size) + 1 for a, b in spans) > BLOCKS:
        spans.pop()
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


def test_writes_its_own_slots_of_its_own_layer_and_no_others() -> None:
    sequences = make_sequences(random.Random(2), [(0, 5), (6, 1)], 4)
    storage = make_storage(CONFIG, num_blocks=BLOCKS, block_size=4)
    run_step(sequences, storage, 2)
    written = torch.zeros(BLOCKS * 4, dtype=torch.bool)
    for sequence in sequences:
        slots = sequence.slots(4)[sequence.new]
        written[slots] = True
        assert torch.equal(storage.k[2, slots], sequence.k[sequence.new])
        assert torch.equal(storage.v[2, slots], sequence.v[sequence.new])
        assert torch.equal(storage.taken[2][slots], sequence.taken[sequence.new])
    assert not storage.k[2, ~written].any()
    assert not storage.v[2, ~written].any()
    assert not storage.k[:2].any()
    assert not storage.taken[0].any()


def test_one_plan_serves_all_layers() -> None:
    sequences = make_sequences(random.Random(3), [(0, 3), (0, 1), (0, 6)], 4)
    storage = make_storage(CONFIG, num_blocks=BLOCKS, block_size=4)
    attention = PagedAttention(StepPlan(sequences=tuple(s.planned for s in sequences)), storage)
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
    plan = StepPlan(sequences=tuple(s.planned for s in sequences))
    q, k, v = (
        torch.cat([getattr(s, name) for s in sequences]).bfloat16() for name in ("q", "k", "v")
    )
    out = PagedAttention(plan, storage)(1, q, k, v, None)
    assert out.dtype is torch.bfloat16
    wanted = torch.cat([s.attended(is_depth_routed=False) for s in sequences])
    assert_close(out.double(), wanted, rtol=0.05, atol=0.05)
