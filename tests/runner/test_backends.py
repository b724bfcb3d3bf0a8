"""Every backend computes the same steps: hidden states, selections and K/V, and who is chosen."""

from __future__ import annotations

import importlib.util
import logging
import sys
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
from momaserve.runner.backends import (
    Backend,
    lay_out_step,
    reference_backend,
    select_backend,
)
from momaserve.runner.kv_storage import KVStorage
from momaserve.runner.routing_recorder import RoutingCounts, RoutingRecorder
from momaserve.runner.sampler import Sampler
from momaserve.tokens.grammar import GrammarSpec
from tests.reference.checkpoints import CASES, random_checkpoint, sample_ids
from tests.runner.factory import make_planned, make_request, make_storage

CPU = torch.device("cpu")
SHAPES = ["dense_post", "moe_8x_pre", "uneven_post", "gqa_pre", "4t4i_post", "depth_4t4i_post"]
POLICIES = (RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED, RoutingPolicy.THRESHOLD)


def load(directory: Path, case: str, dtype: torch.dtype) -> MomaModel:
    random_checkpoint(directory, seed=1, **CASES[case])
    model = load_model(directory, ModelConfig.load(directory), dtype=dtype, device=CPU)
    model.set_rope(256)
    return model


def sampler_of(model: MomaModel) -> Sampler:
    return Sampler(GrammarSpec.from_config(model.config), CPU)


def choose(name: str, model: MomaModel, storage: KVStorage, *, keep_weights: bool) -> Backend:
    return select_backend(name, model, storage, sampler_of(model), keep_weights=keep_weights)


def requests_of(config: dict[str, Any]) -> list[Request]:
    """Four requests with 70 tokens each, routed by all policies."""
    ids = [sample_ids(config, seed) * 8 for seed in range(4)]
    return [
        make_request(f"r{i}", own[: (8, 60, 70, 40)[i]], own[(8, 60, 70, 40)[i] : 70],
                     routing=POLICIES[i % 3], prompt_routing=prompt)
        for i, (own, prompt) in enumerate(
            zip(ids, (*POLICIES, RoutingPolicy.EXPERT_CHOICE), strict=True)
        )
    ]  # fmt: skip


NUM_BLOCKS = 480
"""Those from 80 on are of entries."""


def steps_of() -> list[StepPlan]:
    """Chunks long and short, from the start and further on, beside decoding rows."""
    blocks = [list(range(first, 76, 4)) for first in range(4)]
    shares = [
        [(0, 0, 8), (1, 0, 33), (2, 0, 5)],
        [(0, 8, 1), (1, 33, 17), (2, 5, 20), (3, 0, 40)],
        [(0, 9, 1), (1, 50, 3), (2, 25, 1), (3, 40, 1)],
    ]
    plans: list[StepPlan] = []
    for share in shares:
        sequences = tuple(
            make_planned(f"r{i}", start, count, blocks[i]) for i, start, count in share
        )
        plans.append(StepPlan(sequences=sequences, num_tokens=sum(count for _, _, count in share)))
    return plans


def run(
    backend: Backend,
    storage: KVStorage,
    config: ModelConfig,
    requests: list[Request],
    plans: list[StepPlan] | None = None,
    *,
    keeps_rows: bool = True,
) -> list[tuple[Tensor, Tensor, RoutingCounts]]:
    """Hidden states, logits and routing counts of each step, those of `steps_of` if not told."""
    by_id = {request.request_id: request for request in requests}
    num_entries = dict.fromkeys(by_id, 0)
    num_routed, num_taken = len(storage.layout.routed), 0
    results: list[tuple[Tensor, Tensor, RoutingCounts]] = []
    with torch.inference_mode():
        for plan in plans or steps_of():
            sequences = tuple(
                planned._replace(
                    entry_blocks=range(80 + i, NUM_BLOCKS, 4),
                    num_entries=num_entries[planned.request_id],
                    max_num_entries=num_entries[planned.request_id]
                    + num_routed * planned.num_new_tokens,
                )
                for i, planned in enumerate(plan.sequences)
            )
            plan = replace(plan, sequences=sequences)
            recorder = RoutingRecorder(keeps_rows=keeps_rows)
            batch, entries = lay_out_step(backend, plan, by_id, config, storage, recorder, {}, {})
            hidden = backend.forward(plan, batch, entries)
            if entries is not None:
                taken = entries.finish()
                num_taken += int(taken.sum())
                for (name, _), count in entries.by_name().items():
                    num_entries[name] = int(count)
                assert sum(num_entries.values()) >= int(taken.sum())
            every = range(config.vocab_size)
            logits = backend.logits(hidden[[0, -1]], every)
            some = backend.logits(hidden[[0, -1]], every[5:50])
            torch.testing.assert_close(some, logits[:, 5:50])
            results.append((hidden, logits, recorder.counts()))
    assert num_taken > 0 or not num_routed
    return results


def without_idle(counts: RoutingCounts) -> RoutingCounts:
    """Kernels do not report groups of a layer that no token came to."""
    return replace(
        counts,
        expert_tokens=tuple(
            entry
            for entry, seen in zip(counts.expert_tokens, counts.group_tokens, strict=True)
            if seen[2]
        ),
        group_tokens=tuple(entry for entry in counts.group_tokens if entry[2]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("case", SHAPES)
def test_compiled_kernels_compute_what_plain_torch_does(
    tmp_path: Path, case: str, num_threads: int, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    model = load(tmp_path, case, dtype)
    config = model.config
    requests = requests_of(config.to_dict())
    # The kernels keep activations in float32: their oracle is the same weights in float32.
    exact = model if dtype is torch.float32 else load_rounded(tmp_path, config)
    wide = make_storage(config, num_blocks=NUM_BLOCKS)
    oracle = reference_backend(exact, wide, sampler_of(exact))
    wanted = run(oracle, wide, config, requests)
    storage = make_storage(config, num_blocks=NUM_BLOCKS, dtype=dtype)
    compiled = choose("cpu", model, storage, keep_weights=False)
    got = run(compiled, storage, config, requests)
    counted = run(compiled, storage, config, requests, keeps_rows=False)
    assert [counts for _, _, counts in counted] == [counts for _, _, counts in got]
    tolerance = 1e-4
    for (hidden, logits, counts), (wanted_hidden, wanted_logits, wanted_counts) in zip(
        got, wanted, strict=True
    ):
        if dtype is torch.float32:
            assert without_idle(counts) == without_idle(wanted_counts)
            torch.testing.assert_close(hidden, wanted_hidden, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(logits, wanted_logits, rtol=tolerance, atol=tolerance)
        else:  # a decision that rounding flips changes a row altogether: most must agree
            close = (hidden - wanted_hidden).abs().amax(1) < 0.15  # K/V are rounded
            assert close.float().mean() > 0.8


def load_rounded(directory: Path, config: ModelConfig) -> MomaModel:
    """The checkpoint rounded to bfloat16, in float32."""
    model = load_model(directory, config, dtype=torch.bfloat16, device=CPU).float()
    model.set_rope(256)
    return model


def test_weights_that_were_packed_are_given_up(tmp_path: Path) -> None:
    model = load(tmp_path, "4t4i_post", torch.float32)
    storage = make_storage(model.config)
    choose("cpu", model, storage, keep_weights=True)
    names = [name for name, weight in model.named_parameters() if weight.numel() == 0]
    assert names == []
    choose("cpu", model, storage, keep_weights=False)
    names = [name for name, weight in model.named_parameters() if weight.numel() == 0]
    assert "lm_head" in names and "blocks.0.self_attn.q_proj.weight" in names
    assert "embed_tokens" not in names
    assert model.missing_for(RoutingPolicy.CAUSAL) is None


def test_auto_takes_compiled_kernels_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = load(tmp_path, "dense_post", torch.float32)
    assert choose("auto", model, make_storage(model.config), keep_weights=False).name == "cpu"
    assert "backend cpu: compiled kernels" in caplog.text


def test_auto_is_plain_torch_without_numba_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "numba" else find(name),
    )
    model = load(tmp_path, "dense_post", torch.float32)
    storage = make_storage(model.config)
    assert choose("auto", model, storage, keep_weights=False).name == "reference"
    assert "since numba is not installed" in caplog.text
    with pytest.raises(ConfigError, match="backend cpu cannot be used: numba is not installed"):
        choose("cpu", model, storage, keep_weights=False)


def test_float16_has_no_compiled_kernels(tmp_path: Path) -> None:
    model = load(tmp_path, "dense_post", torch.float16)
    storage = make_storage(model.config, dtype=torch.float16)
    assert choose("auto", model, storage, keep_weights=False).name == "reference"
    with pytest.raises(ConfigError, match=r"no kernels for torch\.float16"):
        choose("cpu", model, storage, keep_weights=False)


def test_plain_torch_on_demand(tmp_path: Path) -> None:
    model = load(tmp_path, "dense_post", torch.float32)
    storage = make_storage(model.config)
    assert choose("reference", model, storage, keep_weights=False).name == "reference"


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **packages: bool) -> None:
    """Which packages seem to be there."""
    find = importlib.util.find_spec

    def look(name: str) -> object:
        return (object() if packages[name] else None) if name in packages else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", look)


@pytest.mark.parametrize("missing", ["xformers", "triton"])
def test_xformers_must_be_installed(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tmp_path, "dense_post", torch.bfloat16)
    storage = make_storage(model.config, dtype=torch.bfloat16)
    pretend_installed(monkeypatch, **{"xformers": True, "triton": True, missing: False})
    wanted = rf"{missing} is not installed \(pip install 'momaserve\[xformers\]'\)"
    with pytest.raises(ConfigError, match=f"backend xformers cannot be used: {wanted}"):
        choose("xformers", model, storage, keep_weights=False)


def test_xformers_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tmp_path, "dense_post", torch.bfloat16)
    storage = make_storage(model.config, dtype=torch.bfloat16)
    pretend_installed(monkeypatch, xformers=True, triton=True)
    with pytest.raises(ConfigError, match="backend xformers cannot be used: the model is on cpu"):
        choose("xformers", model, storage, keep_weights=False)


@pytest.mark.parametrize(
    ("capability", "block_size", "reason"),
    [
        ((7, 5), 16, r"the device has compute capability 7\.5, less than 8\.0"),
        ((8, 0), 16, "head_dim 8 is not one of"),
        ((9, 0), 16, "head_dim 8 is not one of"),
    ],
)
def test_xformers_on_a_gpu_that_it_cannot_use(
    tmp_path: Path, capability: tuple[int, int], block_size: int, reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = load(tmp_path, "dense_post", torch.bfloat16)
    storage = make_storage(model.config, dtype=torch.bfloat16, block_size=block_size)
    pretend_installed(monkeypatch, xformers=True, triton=True)
    pretend_gpu(monkeypatch, storage, capability)
    with pytest.raises(ConfigError, match=f"backend xformers cannot be used: {reason}"):
        choose("xformers", model, storage, keep_weights=False)


def test_xformers_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_checkpoint(tmp_path, seed=1, **CASES["dense_post"] | {"head_dim": 16})
    config = ModelConfig.load(tmp_path)
    model = load_model(tmp_path, config, dtype=torch.bfloat16, device=CPU)
    storage = make_storage(config, dtype=torch.bfloat16, block_size=16)
    pretend_installed(monkeypatch, xformers=True, triton=True)
    pretend_gpu(monkeypatch, storage, (8, 0))
    monkeypatch.setitem(sys.modules, "momaserve.runner.xformers_backend", None)
    with pytest.raises(ConfigError, match="xformers cannot be loaded: .*xformers_backend"):
        choose("xformers", model, storage, keep_weights=False)


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, storage: KVStorage, capability: tuple[int, int]
) -> None:
    """The storage says that it is on a GPU of this capability."""
    seen = SimpleNamespace(device=torch.device("cuda"), dtype=storage.k.dtype)
    monkeypatch.setattr(storage, "k", seen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
