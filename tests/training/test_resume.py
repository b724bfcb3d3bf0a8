"""A run that was broken off and resumed ends with the very bits of an undisturbed one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from momaserve.config import RoutingPolicy
from momaserve.errors import DataError
from momaserve.models.config import ModelConfig
from momaserve.models.weights import load_model
from momaserve.training import image_tokenizer
from momaserve.training.demo import load_image_tokenizer, rows_of_step
from momaserve.training.fit_routers import FitRoutersConfig, fit_routers
from momaserve.training.image_tokenizer import ImageTokenizerTraining, train_image_tokenizer
from momaserve.training.packing import PackedRows
from momaserve.training.pretrain import PretrainConfig, pretrain
from tests.training.factory import DEPTH, draw, make_packer, tiny_config, tiny_model

CPU = torch.device("cpu")
PRETRAIN = PretrainConfig(
    num_steps=7, num_rows=2, row_length=30, conversation_every=3, save_every=3, log_every=2
)
CODES = ImageTokenizerTraining(
    model={
        "image_size": 8,
        "levels": (4, 4),
        "encoder_channels": (4, 8),
        "decoder_channels": (4, 8),
        "blocks_per_stage": 1,
    },
    num_steps=7,
    batch_size=4,
    save_every=3,
    log_every=2,
)
ROUTERS = FitRoutersConfig(num_steps=7, save_every=3, log_every=2)


class PowerCut(Exception):
    """Ends a run in the middle."""


class CutAfter:
    """Counts calls, and raises at the call after `count`."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> None:
        if self.left == 0:
            raise PowerCut
        self.left -= 1


@pytest.fixture(autouse=True)
def one_thread() -> None:
    assert torch.get_num_threads() == 1, "sums over threads have no fixed order"


def assert_same_bits(got: nn.Module, wanted: nn.Module) -> None:
    mine, theirs = got.state_dict(), wanted.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def assert_same_files(got: Path, wanted: Path, *names: str) -> None:
    for name in names:
        assert (got / name).read_bytes() == (wanted / name).read_bytes(), name


def broken_off_and_resumed(
    train: Callable[[Path, Callable[[], None]], nn.Module], out: Path, *cuts: int
) -> nn.Module:
    """`train` is broken off after some steps, more than once, and then let through."""
    for cut in cuts:
        with pytest.raises(PowerCut):
            train(out, CutAfter(cut))
    return train(out, lambda: None)


# --- pretraining ---------------------------------------------------------------------------


def pretrained(config: ModelConfig, out: Path, before_step: Callable[[], None]) -> nn.Module:
    packer = make_packer(config)

    def rows(step: int) -> PackedRows:
        before_step()
        return rows_of_step(PRETRAIN, packer, draw, step)

    torch.manual_seed(random.SystemRandom().randrange(2**31))  # nothing may hang on it
    return pretrain(config, PRETRAIN, rows, out)


@pytest.mark.parametrize(
    "changes",
    [{}, {"depth_routing": DEPTH, "norm_order": "pre"}, {"tie_word_embeddings": True}],
    ids=str,
)
def test_pretraining(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)

    def train(out: Path, before_step: Callable[[], None]) -> nn.Module:
        return pretrained(config, out, before_step)

    whole = train(tmp_path / "whole", lambda: None)
    resumed = broken_off_and_resumed(train, tmp_path / "resumed", 4, 1, 3)
    assert_same_bits(resumed, whole)
    assert_same_files(
        tmp_path / "resumed",
        tmp_path / "whole",
        "config.json",
        "model.safetensors",
        "run/state.safetensors",
        "run/run.json",
    )
    again = train(tmp_path / "resumed", CutAfter(0))  # it is finished: no step is left
    assert_same_bits(again, whole)


def test_pretraining_another_model_in_the_same_place_is_refused(tmp_path: Path) -> None:
    pretrained(tiny_config(), tmp_path, lambda: None)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(DataError, match="another configuration"):
        pretrained(tiny_config(rope_theta=500.0), tmp_path, lambda: None)
    with pytest.raises(DataError, match="another configuration"):
        config = tiny_config()
        other = replace(PRETRAIN, seed=1)
        packer = make_packer(config)
        pretrain(config, other, lambda step: rows_of_step(other, packer, draw, step), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_rows_of_a_step_are_a_function_of_seed_and_step() -> None:
    packer = make_packer(tiny_config())

    def rows(step: int, **changes: Any) -> PackedRows:
        return rows_of_step(replace(PRETRAIN, **changes), packer, draw, step)

    assert [rows(step).documents is None for step in range(7)] == [
        True, False, False, True, False, False, True,
    ]  # fmt: skip
    assert rows(0).token_ids.shape == (1, 60)
    assert rows(1).token_ids.shape == (2, 30)
    assert torch.equal(rows(5).token_ids, rows(5).token_ids)
    assert not torch.equal(rows(5).token_ids, rows(4).token_ids)
    assert not torch.equal(rows(5).token_ids, rows(5, seed=1).token_ids)
    assert all(rows(step, conversation_every=0).documents is not None for step in range(7))


# --- image tokenizer -----------------------------------------------------------------------


def pictures(count: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def coded(
    training: ImageTokenizerTraining,
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    before_step: Callable[[], None],
    init: Path | None = None,
) -> nn.Module:
    loss = image_tokenizer.reconstruction_loss

    def counted(*tensors: torch.Tensor) -> torch.Tensor:
        before_step()
        return loss(*tensors)

    with monkeypatch.context() as patch:
        patch.setattr(image_tokenizer, "reconstruction_loss", counted)
        return train_image_tokenizer(training, pictures(12, 1), pictures(3, 2), out, init)


FILES = ("config.json", "model.safetensors", "run/state.safetensors")


def test_image_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(out: Path, before_step: Callable[[], None]) -> nn.Module:
        return coded(CODES, monkeypatch, out, before_step)

    whole = train(tmp_path / "whole", lambda: None)
    resumed = broken_off_and_resumed(train, tmp_path / "resumed", 4, 1, 3)
    assert_same_bits(resumed, whole)
    assert_same_files(tmp_path / "resumed", tmp_path / "whole", *FILES)
    assert_same_bits(load_image_tokenizer(tmp_path / "resumed"), whole)
    with pytest.raises(DataError, match="another configuration"):
        coded(replace(CODES, seed=1), monkeypatch, tmp_path / "whole", lambda: None)


def test_image_decoder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = coded(CODES, monkeypatch, tmp_path / "first", lambda: None)
    training = replace(CODES, decoder_only=True, seed=4)

    def train(out: Path, before_step: Callable[[], None]) -> nn.Module:
        return coded(training, monkeypatch, out, before_step, tmp_path / "first")

    whole = train(tmp_path / "whole", lambda: None)
    resumed = broken_off_and_resumed(train, tmp_path / "resumed", 5)
    assert_same_bits(resumed, whole)
    after = whole.state_dict()
    changed = {k for k, old in first.state_dict().items() if not torch.equal(after[k], old)}
    assert changed  # and the codes in use stay what they were:
    assert all(name.startswith("decoder.") for name in changed)
    with pytest.raises(DataError, match="decoder_only needs --init"):
        coded(training, monkeypatch, tmp_path / "third", lambda: None)
    shapeless = replace(training, model={})  # then the shape is that of what it starts from
    again = coded(shapeless, monkeypatch, tmp_path / "fourth", lambda: None, tmp_path / "first")
    assert_same_bits(again, whole)
    other = replace(training, model={**CODES.model, "image_size": 16})
    with pytest.raises(DataError, match="of another shape than the recipe's section says"):
        coded(other, monkeypatch, tmp_path / "fifth", lambda: None, tmp_path / "first")


# --- routers -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"depth_routing": DEPTH}], ids=str)
def test_routers(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    packer = make_packer(config)

    def train(out: Path, before_step: Callable[[], None]) -> nn.Module:
        def rows(step: int) -> PackedRows:
            before_step()
            return rows_of_step(PRETRAIN, packer, draw, step)

        return fit_routers(tiny_model(config), ROUTERS, rows, out)

    for out in ("whole", "resumed"):
        (tmp_path / out).mkdir()
    whole = train(tmp_path / "whole", lambda: None)
    resumed = broken_off_and_resumed(train, tmp_path / "resumed", 4, 1, 3)
    assert_same_bits(resumed, whole)
    names = ("config.json", "model.safetensors", "run-routers/state.safetensors")
    assert_same_files(tmp_path / "resumed", tmp_path / "whole", *names)
    loaded = load_model(tmp_path / "whole", config, dtype=torch.float32, device=CPU)
    for policy in RoutingPolicy:
        assert loaded.missing_for(policy) is None
    again = train(tmp_path / "whole", CutAfter(0))
    assert_same_bits(again, whole)
    with pytest.raises(DataError, match="another configuration"):
        other = replace(ROUTERS, seed=2)
        fit_routers(
            tiny_model(config),
            other,
            lambda step: rows_of_step(PRETRAIN, packer, draw, step),
            tmp_path / "whole",
        )
