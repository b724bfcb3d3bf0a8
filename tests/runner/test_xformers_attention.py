"""What xformers is handed is right: read as its paged operator reads it, it is plain attention.

xformers has no operator for the CPU, so a double in plain torch takes its place. It holds the
operator's own terms: what it may be given, and what it makes of pages, lengths and rows.
"""

from __future__ import annotations

import importlib
import logging
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from momaserve.core.plan import PlannedSequence, StepPlan
from momaserve.runner import backends, xformers_attention
from momaserve.runner.backends import reference_backend
from momaserve.runner.kv_storage import KVLayout, KVStorage
from momaserve.runner.xformers_attention import PagedRuns, XformersAttention, obstacle_to, plan_runs
from tests.models.factory import make_config
from tests.runner.factory import make_planned, make_storage
from tests.runner.test_backends import (
    NUM_BLOCKS,
    SHAPES,
    choose,
    load,
    requests_of,
    run,
    sampler_of,
)

CPU = torch.device("cpu")


class FwOp:
    """Stands for `xformers.ops.fmha.triton_splitk.FwOp`."""

    BLOCK_N = 64
    refuses: tuple[str, ...] = ()

    @classmethod
    def not_supported_reasons(cls, inputs: Inputs) -> list[str]:
        """Those of its reasons that have to do with pages and rows, and `refuses`."""
        bias, reasons = inputs.attn_bias, list(cls.refuses)
        if inputs.query.shape[1] != sum(bias.q_seqlen):
            reasons.append(f"Expected total {sum(bias.q_seqlen)} queries")
        if min(bias.q_seqlen) != max(bias.q_seqlen):
            reasons.append("Variable query len is not supported for causal masks")
        if max(bias.q_seqlen) > 16:
            reasons.append("Query length should not be larger than 16")
        if inputs.key.shape[1] % bias.page_size:
            reasons.append("key.shape[1] should be divisible by the page size")
        if bias.page_size % cls.BLOCK_N:
            reasons.append("page size should be divisible by the block size")
        return reasons


@dataclass
class PagedBias:
    """Stands for `PagedBlockDiagonalCausalWithOffsetPaddedKeysMask`."""

    q_seqlen: list[int]
    kv_seqlen: list[int]
    block_tables: Tensor
    page_size: int

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: list[int],
        kv_seqlen: list[int],
        block_tables: Tensor,
        page_size: int,
        *,
        device: torch.device,
    ) -> PagedBias:
        assert len(q_seqlen) == len(kv_seqlen) == len(block_tables)
        assert max(kv_seqlen) <= block_tables.shape[1] * page_size
        assert block_tables.dtype is torch.int32 and block_tables.device == device
        return cls(q_seqlen, kv_seqlen, block_tables, page_size)


@dataclass
class Inputs:
    """Stands for `xformers.ops.fmha.Inputs`."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: PagedBias


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: PagedBias, *, op: tuple[type[FwOp], None]
) -> Tensor:
    """Stands for `xformers.ops.memory_efficient_attention`: one sequence after the other."""
    assert op[0].not_supported_reasons(Inputs(query, key, value, attn_bias)) == []
    assert query.ndim == 5 and query.shape[0] == key.shape[0] == 1
    assert key.shape == value.shape and key.shape[2:] == query.shape[2:]
    assert query.dtype is key.dtype is value.dtype
    assert query.shape[3] == 1 or key.stride(3) == value.stride(3) == 0
    page_size, outs, first = attn_bias.page_size, [], 0
    for index, (num_rows, num_keys) in enumerate(
        zip(attn_bias.q_seqlen, attn_bias.kv_seqlen, strict=True)
    ):
        assert num_keys >= num_rows
        positions = torch.arange(num_keys)
        pages = attn_bias.block_tables[index, positions // page_size].long()
        slots = pages * page_size + positions % page_size
        rows = query[0, first : first + num_rows].double()
        first += num_rows
        scores = torch.einsum("qghk,sghk->ghqs", rows, key[0, slots].double())
        ends = num_keys - num_rows + torch.arange(num_rows)
        scores = scores.masked_fill(positions > ends.unsqueeze(1), -torch.inf)
        weights = (scores * query.shape[-1] ** -0.5).softmax(-1)
        outs.append(torch.einsum("ghqs,sghk->qghk", weights, value[0, slots].double()))
    return torch.cat(outs).unsqueeze(0).to(query.dtype)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`xformers_backend`, with the double in the place of xformers."""
    ours = "momaserve.runner.xformers_backend"
    contents: dict[str, dict[str, Any]] = {
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "xformers.ops.fmha": {"Inputs": Inputs},
        "xformers.ops.fmha.triton_splitk": {"FwOp": FwOp},
        "xformers.ops.fmha.attn_bias": {
            "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": PagedBias
        },
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules.pop(ours, None)
    yield importlib.import_module(ours)
    del sys.modules[ours]


@pytest.mark.parametrize("max_runs", [512, 2])
@pytest.mark.parametrize("case", [*SHAPES, "no_qk_norm_pre", "depth_list_post"])
def test_steps_are_those_of_plain_torch(
    tmp_path: Path, case: str, max_runs: int, backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding rows, chunks from the start and further on, and both in one step."""
    monkeypatch.setattr(xformers_attention, "MAX_RUNS", max_runs)
    model = load(tmp_path, case, torch.float32)
    config, sampler = model.config, sampler_of(model)
    requests = requests_of(config.to_dict())
    expected = make_storage(config, num_blocks=NUM_BLOCKS)
    wanted = run(reference_backend(model, expected, sampler), expected, config, requests)
    storage = make_storage(config, num_blocks=NUM_BLOCKS)
    made = backend.xformers_backend(model, storage, sampler, keep_weights=False)
    assert made.name == "xformers"
    got = run(made, storage, config, requests)
    for (hidden, logits, counts), (other_hidden, other_logits, other_counts) in zip(
        got, wanted, strict=True
    ):
        assert counts == other_counts
        torch.testing.assert_close(hidden, other_hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, other_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(storage.k, expected.k, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(storage.v, expected.v, rtol=1e-4, atol=1e-4)
    assert torch.equal(storage.index, expected.index)


def test_it_is_chosen_by_name_and_says_so(
    tmp_path: Path, backend: ModuleType, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(backends._OBSTACLES, "xformers", lambda config, storage: None)
    model = load(tmp_path, "dense_post", torch.float32)
    storage = make_storage(model.config)
    assert choose("xformers", model, storage, keep_weights=False).name == "xformers"
    assert "backend xformers: plain torch, and the paged attention of xformers" in caplog.text


def layout_of(block_size: int, num_plain: int = 3) -> KVLayout:
    return KVLayout(block_size, plain=tuple(range(num_plain)), routed=())


def plan_of(*sequences: PlannedSequence) -> StepPlan:
    return StepPlan(sequences=sequences)


def test_a_chunk_and_a_decoding_row() -> None:
    """Twenty new tokens are a run of 16 and one of 4; blocks of 3 layers are 3 pages each."""
    plan = plan_of(make_planned("a", 30, 20, [7, 2, 5, 9, 4]), make_planned("b", 16, 1, [1, 3]))
    sixteen, four, one = plan_runs(plan, layout_of(16), CPU)
    assert (sixteen.length, sixteen.num_runs, sixteen.seq_lens) == (16, 1, [46])
    assert sixteen.rows.tolist() == list(range(16))
    assert sixteen.page_table.tolist() == [[21, 6, 15, 21]]
    assert (four.length, four.num_runs, four.seq_lens) == (4, 1, [50])
    assert four.rows.tolist() == [16, 17, 18, 19]
    assert four.page_table.tolist() == [[21, 6, 15, 27]]
    assert (one.length, one.num_runs, one.seq_lens) == (1, 1, [17])
    assert one.rows.tolist() == [20]
    assert one.page_table.tolist() == [[3, 9]]
    assert {runs.page_size for runs in (sixteen, four, one)} == {16}


def test_calls_are_filled_up_to_powers_of_two() -> None:
    """By copies of the first run that read one key per row, whatever the run itself reads."""
    blocks = [range(10 * i, 10 * i + 9) for i in range(3)]
    plan = plan_of(*(make_planned(str(i), 20 + 40 * i, 1, blocks[i]) for i in range(3)))
    (runs,) = plan_runs(plan, layout_of(16, num_plain=1), CPU)
    assert runs.num_runs == 3
    assert runs.rows.tolist() == [0, 1, 2, 0]
    assert runs.seq_lens == [21, 61, 101, 1]
    assert runs.page_table.tolist() == [
        [0, 1, 0, 0, 0, 0, 0, 0],
        [10, 11, 12, 13, 10, 10, 10, 10],
        [20, 21, 22, 23, 24, 25, 26, 20],
        [0, 1, 0, 0, 0, 0, 0, 0],
    ]


def test_a_call_has_no_more_runs_than_a_grid_has_room_for() -> None:
    plan = plan_of(make_planned("a", 0, 16 * 1025, range(1025)))
    calls = plan_runs(plan, layout_of(16), CPU)
    assert [runs.num_runs for runs in calls] == [512, 512, 1]
    rows = torch.cat([runs.rows for runs in calls])
    assert torch.equal(rows, torch.arange(16 * 1025))


@pytest.mark.parametrize("seed", range(20))
def test_each_row_once_and_all_keys_up_to_its_own(seed: int) -> None:
    rng = random.Random(seed)
    layout = layout_of(2 ** rng.randint(0, 6), rng.randint(1, 4))
    planned: list[PlannedSequence] = []
    for i in range(rng.randint(1, 9)):
        start, count = rng.choice([0, rng.randint(0, 99)]), rng.choice([1, rng.randint(1, 60)])
        planned.append(make_planned(str(i), start, count, rng.sample(range(1000), 200)))
    wanted = [
        [
            s.blocks[position // layout.block_size] * layout.slots_per_block
            + position % layout.block_size
            for position in range(end + 1)
        ]
        for s in planned
        for end in range(s.start, s.start + s.num_new_tokens)
    ]
    got: dict[int, list[int]] = {}
    for runs in plan_runs(plan_of(*planned), layout, CPU):
        assert len(runs.seq_lens) == len(runs.page_table) == 1 << (runs.num_runs - 1).bit_length()
        for index in range(runs.num_runs):
            for i in range(runs.length):
                num_keys = runs.seq_lens[index] - runs.length + i + 1
                row = int(runs.rows[index * runs.length + i])
                assert row not in got
                got[row] = [
                    int(runs.page_table[index, position // runs.page_size]) * runs.page_size
                    + position % runs.page_size
                    for position in range(num_keys)
                ]
    assert [got[row] for row in range(len(wanted))] == wanted


class Recording:
    """An operator that keeps what it is given, and answers with rows of ones."""

    def __init__(self) -> None:
        self.biases: list[PagedRuns] = []
        self.given: list[tuple[Tensor, Tensor, Tensor, PagedRuns]] = []

    def bias(self, runs: PagedRuns) -> PagedRuns:
        self.biases.append(runs)
        return runs

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: PagedRuns) -> Tensor:
        self.given.append((q, k, v, bias))
        return torch.ones_like(q)


def test_layers_share_a_table_and_hand_over_the_memory_itself() -> None:
    config = make_config(depth_routing=None, num_attention_heads=6, num_key_value_heads=2)
    storage = make_storage(config, num_blocks=9, block_size=16)
    operator = Recording()
    plan = plan_of(make_planned("a", 0, 17, [3, 8]), make_planned("b", 5, 1, [0]))
    attention = XformersAttention(plan, storage, None, operator)
    size = config.head_dim
    num_layers = config.num_hidden_layers
    for layer in range(num_layers):
        q, k = torch.randn(18, 6, size), torch.randn(18, 2, size)
        out = attention(layer, q, k, k + 1, None)
        assert out.shape == q.shape and bool((out == 1).all())
        for _, keys, values, _ in operator.given[-2:]:
            assert keys.shape == (1, (9 * num_layers - layer) * 16, 2, 3, size)
            assert keys.stride(3) == values.stride(3) == 0
            assert keys.data_ptr() == storage.keys(layer).data_ptr()
            assert values.data_ptr() == storage.values(layer).data_ptr()
            page = operator.given[-1][3].page_table[0, 1]  # the chunk's last row, in its 2nd block
            assert torch.equal(keys[0, page * 16, :, 0], k[16])
            assert torch.equal(values[0, page * 16, :, 2], k[16] + 1)
        rows = operator.given[-2][0]
        assert torch.equal(rows[0], q[:16].view(16, 2, 3, size))
    assert [runs.length for runs in operator.biases] == [16, 1]


def test_what_is_not_a_number_stays_with_its_own_request(backend: ModuleType) -> None:
    config = make_config(depth_routing=None)

    def attended(broken: float) -> Tensor:
        storage = make_storage(config, num_blocks=12, block_size=4)
        generator = torch.Generator().manual_seed(1)
        for memory in (storage.k, storage.v):
            memory.copy_(torch.randn(memory.shape, generator=generator))
        storage.keys(0)[0], storage.values(0)[0] = broken, broken  # of request a, at position 0
        plan = plan_of(
            *(make_planned(name, 7, 1, [2 * i, 2 * i + 1]) for i, name in enumerate("abc"))
        )
        attention = XformersAttention(plan, storage, None, backend.SplitKOperator(4))
        shape = (3, config.num_attention_heads, config.head_dim)
        q = torch.randn(shape, generator=generator)
        k = torch.randn(3, config.num_key_value_heads, config.head_dim, generator=generator)
        return attention(0, q, k, k, None)

    healthy, ill = attended(0.5), attended(float("nan"))
    assert bool(ill[0].isnan().all())
    assert torch.equal(ill[1:], healthy[1:])


@pytest.mark.parametrize(
    ("head_dim", "dtype", "block_size", "reason"),
    [
        (64, torch.bfloat16, 16, "None"),
        (64, torch.float16, 256, "None"),
        (64, torch.float32, 16, "no kernels for torch.float32, only for torch.bfloat16 and"),
        (80, torch.bfloat16, 16, "head_dim 80 is not one of (16, 32, 64, 128, 256, 512)"),
        (64, torch.bfloat16, 8, "block_size 8 is less than its smallest page, 16 tokens"),
    ],
)
def test_sizes(head_dim: int, dtype: torch.dtype, block_size: int, reason: str) -> None:
    assert reason in str(obstacle_to(head_dim, dtype, block_size))


@pytest.mark.parametrize(("page_size", "tile"), [(16, 16), (32, 32), (64, 64), (256, 64)])
def test_tiles_are_no_larger_than_pages(backend: ModuleType, page_size: int, tile: int) -> None:
    kernels = backend.SplitKOperator(page_size).kernels
    assert (kernels.BLOCK_N, issubclass(kernels, FwOp)) == (tile, True)


def test_the_operator_is_asked_and_tried_before_it_is_used(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(num_attention_heads=4, num_key_value_heads=2)
    storage: KVStorage = make_storage(config, block_size=16)
    assert backend.obstacle_to(config, storage) is None

    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("at 12:4:\n    tl.dot(q, k)\n    ^\nno such instruction\n")

    monkeypatch.setattr(backend, "memory_efficient_attention", fail)
    wanted = "its operator fails on cpu: no such instruction"
    assert backend.obstacle_to(config, storage) == wanted

    def interrupt(*_: object, **__: object) -> Tensor:
        raise TimeoutError

    monkeypatch.setattr(backend, "memory_efficient_attention", interrupt)
    assert backend.obstacle_to(config, storage) == "its operator fails on cpu: TimeoutError"
    monkeypatch.setattr(FwOp, "refuses", ("too old", "too odd"))
    assert backend.obstacle_to(config, storage) == "too old; too odd"
