"""The Triton backend computes what plain torch does: steps of every kind, and padded ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.core.plan import StepPlan
from momaserve.errors import ConfigError
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.weights import load_model
from momaserve.request import Request
from momaserve.runner import gpu_buckets, gpu_step
from momaserve.runner.backends import Backend, lay_out_step, reference_backend, select_backend
from momaserve.runner.gpu_buffers import StepShape
from momaserve.runner.gpu_model import GpuModel
from momaserve.runner.gpu_sampler import GpuSampler
from momaserve.runner.gpu_step import GpuBatch, StepLayout
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.sampler import Penalties, Sampler, SampleRow
from momaserve.runner.triton_backend import GraphCache, obstacle_to
from momaserve.sampling import Distribution
from momaserve.tokens.grammar import Choices, GrammarSpec
from tests.kernels.triton.device import DEVICE
from tests.kernels.triton.fat import fatten
from tests.models.factory import make_config
from tests.reference.checkpoints import CASES, random_checkpoint, sample_ids
from tests.runner.factory import make_planned, make_request
from tests.runner.test_backends import NUM_BLOCKS, run, without_idle

TOLERANCE = 1e-4
SHAPES = {
    name: {**shape, "head_dim": 16}  # the least that the kernels have
    | ({"layers": 3} if shape.get("depth", {}).get("layers") == [0, 2] else {})
    for name, shape in CASES.items()
}


@pytest.fixture(autouse=True)
def _fat_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        fatten(monkeypatch)


def load(directory: Path, case: str) -> MomaModel:
    random_checkpoint(directory, seed=1, **SHAPES[case])
    config, device = ModelConfig.load(directory), torch.device(DEVICE)
    return load_model(directory, config, dtype=torch.float32, device=device)


def storage_of(
    config: ModelConfig, num_blocks: int = 8, dtype: torch.dtype = torch.float32
) -> KVStorage:
    device = torch.device(DEVICE)
    return KVStorage(config, num_blocks=num_blocks, block_size=4, dtype=dtype, device=device)


def choose(model: MomaModel, storage: KVStorage, *, keep_weights: bool = False) -> Backend:
    sampler = Sampler(GrammarSpec.from_config(model.config), storage.k.device)
    return select_backend("triton", model, storage, sampler, keep_weights=keep_weights)


def requests_of(config: ModelConfig) -> list[Request]:
    """Three requests of words and pictures under different policies."""
    words = 1 if config.image is not None else 5
    ids = [sample_ids(config.to_dict(), seed, words=words) for seed in range(3)]
    return [
        make_request("r0", ids[0][:4], ids[0][4:]),
        make_request("r1", ids[1][:7], ids[1][7:], routing=RoutingPolicy.CALIBRATED),
        make_request(
            "r2", ids[2][:6], ids[2][6:],
            routing=RoutingPolicy.THRESHOLD, prompt_routing=RoutingPolicy.EXPERT_CHOICE,
        ),
    ]  # fmt: skip


def plan_of(*parts: tuple[int, int, int]) -> StepPlan:
    """A step from (request, start, new tokens)."""
    sequences = tuple(
        make_planned(f"r{i}", start, count, range(i, 24, 3)) for i, start, count in parts
    )
    return StepPlan(sequences=sequences, num_tokens=sum(count for _, _, count in parts))


STEPS = [
    plan_of((0, 0, 3), (1, 0, 5), (2, 0, 6)),
    plan_of((0, 3, 1), (1, 5, 2)),
    plan_of((2, 6, 1), (0, 4, 1), (1, 7, 1)),
]

TRIED = [
    "moe_8x_pre", "1t1i_pre", "uneven_post", "gqa_pre", "tied_post", "no_qk_norm_pre",
    "no_image_post", "depth_4t4i_post", "depth_list_post", "depth_image_only_post",
    "depth_text_only_pre",
]  # fmt: skip
"""Every property of CASES: the interpreter takes seconds for each."""


@pytest.mark.parametrize("case", TRIED)
def test_steps_of_every_kind(tmp_path: Path, case: str) -> None:
    model = load(tmp_path, case)
    config = model.config
    requests = requests_of(config)
    storage = storage_of(config, NUM_BLOCKS)
    sampler = Sampler(GrammarSpec.from_config(config), storage.k.device)
    wanted = run(reference_backend(model, storage, sampler), storage, config, requests, STEPS)
    storage = storage_of(config, NUM_BLOCKS)
    got = run(choose(model, storage), storage, config, requests, STEPS)
    for (hidden, logits, counts), (wanted_hidden, wanted_logits, wanted_counts) in zip(
        got, wanted, strict=True
    ):
        assert without_idle(counts) == without_idle(wanted_counts)
        torch.testing.assert_close(hidden, wanted_hidden, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(logits, wanted_logits, rtol=TOLERANCE, atol=TOLERANCE)


def buckets(monkeypatch: pytest.MonkeyPatch, rows: int, blocks: int) -> None:
    """Lets decoding steps have exactly these sizes."""
    monkeypatch.setattr(gpu_step, "rows_bucket", lambda _: rows)
    monkeypatch.setattr(gpu_step, "blocks_bucket", lambda _: blocks)


def test_a_padded_step_is_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path, "depth_4t4i_post")
    config = model.config
    by_id = {request.request_id: request for request in requests_of(config)}
    sequences = tuple(
        planned._replace(entry_blocks=range(30 + i, 48, 3), max_num_entries=2)
        for i, planned in enumerate(plan_of((0, 0, 1), (1, 0, 1), (2, 6, 1)).sequences)
    )
    plan = StepPlan(sequences=sequences, num_tokens=3)
    found: list[list[Tensor]] = []
    for rows, blocks in ((3, 8), (4, 16), (8, 8)):
        buckets(monkeypatch, rows, blocks)
        storage = storage_of(config, 48)
        backend = choose(model, storage, keep_weights=True)
        with torch.inference_mode():
            batch, entries = lay_out_step(backend, plan, by_id, config, storage, None, {}, {})
            assert isinstance(batch, GpuBatch) and entries is not None
            assert batch.buffers.shape.rows == rows
            hidden = backend.forward(plan, batch, entries)
            assert len(hidden) == 3
            taken = entries.finish()
            counts = torch.cat([*entries.by_name().values()])
            assert counts.tolist() == taken.tolist()
            assert (batch.buffers.places[:, 3:] == -1).all()  # padding takes no expert
            assert not batch.buffers.taken[:, 3:].any()
        written = (storage.k != 0).flatten(1).any(1)
        assert written.sum() == 3 + taken.sum()  # one layer keeps all, and padding nothing
        found.append([hidden, storage.k, storage.v, storage.index, taken])
    for others in found[1:]:
        for got, wanted in zip(others, found[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


class FakeGraph:
    """What was captured, as a function of no arguments."""

    replayed = 0

    def replay(self) -> None:
        type(self).replayed += 1


def test_decoding_steps_are_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[object] = []

    @contextmanager
    def capture(graph: object, **_: object) -> Iterator[None]:
        captured.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    calls: list[Any] = []

    def forward(buffers: Any) -> Tensor:
        calls.append(buffers)
        return torch.full((1,), float(len(calls)))

    def step(rows: int, max_q: int = 1, num_segments: int = 0) -> Any:
        shape = StepShape(rows=rows, sequences=rows, blocks=8, entry_blocks=1, max_q=max_q)
        return SimpleNamespace(shape=shape, num_segments=num_segments)

    graphs = GraphCache(forward, torch.device("cuda"))
    assert graphs.run(step(4)) == 1  # the step itself; the capture is the second call
    assert (len(calls), len(captured), FakeGraph.replayed) == (2, 1, 0)
    assert graphs.run(step(4)) == 2  # what the capture writes
    assert (len(calls), len(captured), FakeGraph.replayed) == (2, 1, 1)
    graphs.run(step(8))
    assert (len(calls), len(captured)) == (4, 2)
    for eager in (step(8, max_q=2), step(4, num_segments=1)):
        graphs.run(eager)
        graphs.run(eager)
    assert (len(calls), len(captured), FakeGraph.replayed) == (8, 2, 1)
    graphs = GraphCache(forward, torch.device("cpu"))
    graphs.run(step(4))
    graphs.run(step(4))
    assert (len(calls), len(captured)) == (10, 2)


def test_a_capture_that_fails_costs_no_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def capture(graph: object, **_: object) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    streams: list[object] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    shape = StepShape(rows=4, sequences=4, blocks=8, entry_blocks=1, max_q=1)
    step: Any = SimpleNamespace(shape=shape, num_segments=0)
    num_calls = 0

    def forward(buffers: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return torch.full((1,), float(num_calls))

    graphs = GraphCache(forward, torch.device("cuda"))
    assert graphs.run(step) == 1  # the step itself; the capture is the second call
    assert graphs.run(step) == 3
    assert graphs.num_captured == 0 and streams == ["stream"]
    assert "steps are launched one by one" in caplog.text


@pytest.mark.skipif(DEVICE == "cpu", reason="GPU: none here, so nothing is captured")
def test_a_replayed_graph_is_the_eager_step(tmp_path: Path) -> None:
    model = load(tmp_path, "4t4i_post")
    storage = storage_of(model.config, 24)
    laid_out = GpuModel(model, storage, keep_weights=True)
    graphs = GraphCache(laid_out.forward, storage.k.device)
    layout = StepLayout(model.config, storage)
    plan = plan_of((0, 0, 1), (1, 0, 1), (2, 0, 1))
    text, pictures, mixed = (30, 31, 32), (5, 6, 7), (30, 6, 33)
    for token_ids in (mixed, text, pictures, mixed):
        requests = {f"r{i}": make_request(f"r{i}", [token]) for i, token in enumerate(token_ids)}
        with torch.inference_mode():
            batch, _ = layout(plan, requests, None, {}, {})
            replayed = graphs.run(batch.buffers).clone()
            torch.testing.assert_close(replayed, laid_out.forward(batch.buffers))


def test_buckets_waste_little() -> None:
    for count in range(1, 500):
        bucket = gpu_buckets.rows_bucket(count)
        assert count <= bucket == gpu_buckets.rows_bucket(bucket)
        assert bucket - count <= max(3, bucket / 3)
        blocks = gpu_buckets.blocks_bucket(count)
        assert count <= blocks == gpu_buckets.blocks_bucket(blocks) <= max(8, 4 * count)


def test_weights_that_were_laid_out_are_given_up(tmp_path: Path) -> None:
    model = load(tmp_path, "4t4i_post")
    storage = storage_of(model.config)
    choose(model, storage, keep_weights=True)
    assert all(weight.numel() for weight in model.parameters())
    choose(model, storage)
    names = [name for name, weight in model.named_parameters() if not weight.numel()]
    assert "lm_head" in names and "blocks.0.self_attn.q_proj.weight" in names
    assert "embed_tokens" not in names


def test_where_it_cannot_run_it_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path, "uneven_post")

    def refused(why: str, dtype: torch.dtype = torch.float32) -> None:
        with pytest.raises(ConfigError, match=f"backend triton cannot be used: .*{why}"):
            choose(model, storage_of(model.config, dtype=dtype))

    refused(r"no kernels for torch\.float64", torch.float64)
    if DEVICE == "cpu":
        refused(r"no products of torch\.bfloat16", torch.bfloat16)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        refused("TRITON_INTERPRET=1 alone")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    refused("triton is not installed")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"head_dim": 8}, "head_dim must be a power of two from 16 to 128, got 8"),
        ({"hidden_size": 20000}, "hidden_size 20000 is more than 16384"),
        ({"vocab_size": 1 << 21}, "vocab_size 2097152 is more than 1048576"),
    ],
)
def test_shapes_without_kernels_are_refused(changes: dict[str, int], why: str) -> None:
    shape = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert obstacle_to(make_config(**shape)) is None
    assert obstacle_to(make_config(**shape | changes)) == why


def test_rows_of_all_ways_are_drawn_as_torch_draws_them() -> None:
    sampler = Sampler(GrammarSpec.from_config(make_config()), torch.device(DEVICE))
    ways = [Distribution(temperature=0), Distribution(temperature=0.9, top_k=7, top_p=0.9)]
    ways += [Distribution(temperature=1.3, min_p=0.05)]
    penalties = Penalties(
        repetition=2.0, presence=0.5, frequency=0.5, prompt_ids=[30], output_counts={31: 2}
    )
    plain = [SampleRow(choices=Choices.TEXT, distribution=how, seed=3, position=4) for how in ways]
    rows = plain + [
        replace(plain[0], bias=((30, 9.0), (33, float("-inf")))),
        replace(plain[2], penalties=penalties),
        replace(plain[2], choices=Choices.TEXT_OR_IMAGE),
    ]
    logits = 3 * torch.randn(len(rows), 40, generator=torch.Generator().manual_seed(2))
    logits = logits.to(DEVICE)
    for some in (rows, rows[:3], rows[4:5]):
        wanted = sampler.sample(logits[: len(some)], some)
        got = GpuSampler(sampler).sample(logits[: len(some)], some)
        assert [part.tolist() for part in got] == [part.tolist() for part in wanted]
    codes = [replace(row, choices=Choices.IMAGE) for row in plain]
    wanted = sampler.sample(logits[:3, 4:20], codes, 4)
    got = GpuSampler(sampler).sample(logits[:3, 4:20], codes, 4)
    assert got[0].tolist() == wanted[0].tolist()
