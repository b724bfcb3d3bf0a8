"""Entries of depth-routed layers get slots behind each other, and end up in the order of tokens."""

from __future__ import annotations

import pytest
import torch

from momaserve.core.plan import PlannedSequence, StepPlan
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.step_entries import StepEntries
from tests.models.factory import make_config
from tests.runner.factory import make_planned, make_storage

CONFIG = make_config()  # layers 0 and 2 have depth routers, so a block has room for 4 entries


def planned(
    name: str,
    start: int,
    count: int,
    *,
    blocks: list[int],
    entries: list[int],
    num_entries: int = 0,
) -> PlannedSequence:
    return make_planned(name, start, count, blocks)._replace(
        entry_blocks=entries, num_entries=num_entries, max_num_entries=num_entries + 2 * count
    )


def take(entries: StepEntries, storage: KVStorage, layer: int, taken: list[int]) -> list[int]:
    """Rows 0, 1, … write 100 * layer + row + 1 as their K."""
    flags = torch.tensor(taken, dtype=torch.bool)
    slots = entries.append(layer, flags)
    rows = flags.nonzero().squeeze(1)
    storage.k[slots[rows]] = (100.0 * layer + rows + 1).view(-1, 1, 1)
    return slots.tolist()


def test_entries_follow_those_that_are_there() -> None:
    storage = make_storage(CONFIG, num_blocks=16)
    plan = StepPlan(
        sequences=(
            planned("a", 5, 1, blocks=[0, 1], entries=[8, 9], num_entries=3),
            planned("b", 0, 1, blocks=[2], entries=[10]),
            planned("c", 2, 1, blocks=[3], entries=[11], num_entries=1),
        )
    )
    entries = StepEntries(plan, storage, {})
    assert take(entries, storage, 0, [1, 0, 1]) == [8 * 4 + 3, -1, 11 * 4 + 1]
    assert take(entries, storage, 2, [1, 1, 0]) == [9 * 4, 10 * 4, -1]
    assert storage.index[:, [5, 8, 14]].tolist() == [[35, -1, 45], [36, 40, -1]]
    assert entries.finish().tolist() == [2, 1, 1]
    counts = {name: int(count) for (name, _), count in entries.by_name().items()}
    assert counts == {"a": 5, "b": 1, "c": 2}


def test_a_chunk_is_brought_into_the_order_of_its_tokens() -> None:
    storage = make_storage(CONFIG, num_blocks=16)
    plan = StepPlan(
        sequences=(
            planned("a", 0, 1, blocks=[0], entries=[8]),
            planned("b", 2, 4, blocks=[1, 2], entries=[9, 10, 11], num_entries=2),
        )
    )
    entries = StepEntries(plan, storage, {})
    take(entries, storage, 0, [1, 1, 0, 1, 1])
    take(entries, storage, 2, [0, 1, 1, 0, 1])
    before = {
        (r, place): float(storage.k[slot, 0, 0])
        for r in range(2)
        for place, slot in enumerate(storage.index[r].tolist())
        if slot >= 0
    }
    assert entries.finish().tolist() == [1, 2, 1, 1, 2]
    # Places of b's tokens: 6 and 7 of block 1, 8 and 9 of block 2; its entries go on from 2.
    assert storage.index[:, 6:10].tolist() == [[38, -1, 41, 42], [39, 40, -1, 43]]
    for (r, place), value in before.items():
        assert float(storage.k[int(storage.index[r, place]), 0, 0]) == value
    assert storage.index[0, 0] == 32
    assert int(entries.by_name()["b", -1]) == 8


def test_counts_go_from_one_step_to_the_next_on_the_device() -> None:
    storage = make_storage(CONFIG, num_blocks=16)
    first = planned("a", 0, 3, blocks=[0], entries=[8, 9])
    entries = StepEntries(StepPlan(sequences=(first,)), storage, {})
    take(entries, storage, 0, [1, 0, 1])
    take(entries, storage, 2, [0, 0, 0])
    entries.finish()
    # Planned before the host knows: at least none, at most six were kept.
    ahead = first._replace(start=3, num_new_tokens=1, max_num_entries=8)
    plan = StepPlan(sequences=(ahead,))
    after = StepEntries(plan, storage, entries.by_name())
    assert take(after, storage, 0, [1]) == [8 * 4 + 2]
    with pytest.raises(KeyError):
        StepEntries(plan, storage, {})
    # One that began anew has nothing in flight, whatever an earlier step says of its name.
    anew = planned("a", 0, 1, blocks=[0], entries=[8])
    again = StepEntries(StepPlan(sequences=(anew,)), storage, entries.by_name())
    assert take(again, storage, 0, [1]) == [8 * 4]


def test_what_a_layer_skips_is_no_longer_found() -> None:
    storage = make_storage(CONFIG, num_blocks=16)
    storage.index.fill_(7)  # of whoever had the block before
    plan = StepPlan(sequences=(planned("a", 0, 2, blocks=[3], entries=[8]),))
    entries = StepEntries(plan, storage, {})
    take(entries, storage, 0, [0, 0])
    take(entries, storage, 2, [0, 0])
    assert storage.index[:, 12:14].tolist() == [[-1, -1], [-1, -1]]
    assert entries.finish().tolist() == [0, 0]
