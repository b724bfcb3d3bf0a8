"""What a pretraining run logs, draws, starts from and refuses."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from momaserve.errors import ConfigError, DataError
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.weights import load_model
from momaserve.training import plot
from momaserve.training.demo import rows_of_step
from momaserve.training.flops import step_flops
from momaserve.training.forward import validation_losses
from momaserve.training.packing import PackedRows
from momaserve.training.pretrain import PretrainConfig, pretrain, save_model
from momaserve.training.run import read_log
from momaserve.training.start import Start, data_position, origin_of, start_from
from tests.models.factory import group
from tests.training.factory import draw, make_packer, tiny_config, tiny_model, words_only

CPU = torch.device("cpu")
TRAINING = PretrainConfig(
    num_steps=7, num_rows=2, row_length=30, conversation_every=3, save_every=4, log_every=2
)
CONFIG = tiny_config()


def rows(step: int) -> PackedRows:
    return rows_of_step(TRAINING, make_packer(CONFIG), draw, step)


def held_out() -> list[PackedRows]:
    fresh = replace(TRAINING, seed=50, conversation_every=0)
    return [rows_of_step(fresh, make_packer(CONFIG), draw, step) for step in range(2)]


def run(out: Path, config: ModelConfig = CONFIG, **changes: Any) -> MomaModel:
    options = {key: changes.pop(key) for key in ("validation", "start", "skip_steps", "plot")
               if key in changes}  # fmt: skip
    return pretrain(config, replace(TRAINING, **changes), rows, out, **options)


def weights(model: MomaModel) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


# --- log -----------------------------------------------------------------------------------


def test_the_log_says_how_it_goes(tmp_path: Path) -> None:
    model = run(tmp_path, validation=held_out(), validate_every=3)
    records = read_log(tmp_path / "run")
    assert [record["step"] for record in records] == [2, 3, 4, 6, 7]
    every = {"text_nll", "image_nll", "all_nll", "tokens", "tokens_per_s", "grad_norm", "flops"}
    load = {f"{m}_{what}" for m in ("text", "image") for what in ("without_expert", "affinity")}
    valid = {"valid_text_nll", "valid_image_nll", "valid_all_nll"}
    found = {int(record["step"]): record.keys() - {"step", "elapsed_s"} for record in records}
    plain = every | load | {"lr_factor"}
    assert found == {
        2: plain,
        3: valid | {"flops"},
        4: plain,
        6: plain | valid,
        7: valid | {"flops"},
    }
    spent = [sum(step_flops(CONFIG, rows(i)) for i in range(n)) for n in (2, 3, 4, 6, 7)]
    assert [record["flops"] for record in records] == spent
    assert all(record["tokens"] == 120 for record in records if "tokens" in record)
    last = validation_losses(model, held_out())
    assert {name: records[-1][f"valid_{name}_nll"] for name in last} == pytest.approx(
        last, abs=1e-6
    )
    assert records[0]["text_nll"] == pytest.approx(3.7, abs=0.5)  # ln 40


def test_all_is_the_mean_over_tokens(tmp_path: Path) -> None:
    run(tmp_path)
    for record in read_log(tmp_path / "run"):
        low, high = sorted((record["text_nll"], record["image_nll"]))
        assert low < record["all_nll"] < high


def test_a_modality_that_does_not_occur_has_no_numbers(tmp_path: Path) -> None:
    def words(step: int) -> PackedRows:
        return rows_of_step(TRAINING, make_packer(CONFIG), words_only, step)

    pretrain(CONFIG, TRAINING, words, tmp_path, validation=[words(100)])
    for record in read_log(tmp_path / "run"):
        assert not [name for name in record if "image" in name]


def test_watching_changes_nothing(tmp_path: Path) -> None:
    quiet = run(tmp_path / "quiet", log_every=100, validate_every=0)
    watched = run(tmp_path / "watched", log_every=1, validate_every=1, validation=held_out())
    assert_same(weights(watched), weights(quiet))


def test_flops_that_an_older_state_did_not_count_are_put_in(tmp_path: Path) -> None:
    def cut_off(step: int) -> PackedRows:
        if step == 4:
            raise KeyboardInterrupt
        return rows(step)

    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, TRAINING, cut_off, tmp_path)
    path = tmp_path / "run" / "state.safetensors"
    state = load_file(path)
    assert state.pop("counter.flops") == sum(step_flops(CONFIG, rows(i)) for i in range(4))
    save_file(state, path)
    run(tmp_path)
    total = 5 * step_flops(CONFIG, rows(4)) + step_flops(CONFIG, rows(5))
    assert read_log(tmp_path / "run")[-1]["flops"] == total


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """Its run.json knows nothing of what can be set today, nor its state of FLOPs."""
    wanted = weights(run(tmp_path / "whole"))
    run(tmp_path / "old")
    directory = tmp_path / "old" / "run"
    config = json.loads((directory / "run.json").read_text())
    for name in ("validate_every", "router_noise", "precision"):
        del config["training"][name]
    for name in ("skip_steps", "origin", "data"):
        del config[name]
    (directory / "run.json").write_text(json.dumps(config, indent=2))
    assert_same(weights(run(tmp_path / "old")), wanted)
    with pytest.raises(DataError, match="another configuration"):
        run(tmp_path / "old", router_noise="gumbel")
    old = {"num_steps", "num_rows", "row_length", "conversation_every", "learning_rate"}
    old |= {"warmup_steps", "decay_from", "weight_decay", "clip_norm", "text_loss_weight", "seed"}
    new = asdict(PretrainConfig()).keys() - old - {"log_every", "save_every"}
    assert new == {"validate_every", "router_noise", "precision"}, "what this test must delete"


# --- drawing -------------------------------------------------------------------------------


def test_losses_are_drawn(tmp_path: Path) -> None:
    run(tmp_path, validation=held_out(), validate_every=3, plot=True)
    with Image.open(tmp_path / "run" / "loss.png") as picture:
        assert picture.size == (640, 480)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_without_matplotlib_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot._say_once.cache_clear()
    run(tmp_path, plot=True)
    assert not (tmp_path / "run" / "loss.png").exists()
    shown = capsys.readouterr().err
    assert shown.count("no loss.png: drawing needs matplotlib: pip install 'momaserve[train]'") == 1


# --- start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_run_begins_with_a_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its weights, auxiliary routers left out; a fresh optimizer, a schedule from the start."""
    first = tiny_model(CONFIG, seed=4)
    save_model(first, tmp_path / "first", dtype)
    loaded = load_model(tmp_path / "first", CONFIG, dtype=torch.float32, device=CPU)
    seen: list[int] = []

    def watched(step: int) -> PackedRows:
        seen.append(step)
        return rows(step)

    start = start_from(tmp_path / "first", CONFIG)
    assert_same(weights(start.model), weights(loaded))
    out = tmp_path / "second"
    training = replace(TRAINING, warmup_steps=3)
    model = pretrain(CONFIG, training, watched, out, start=start, skip_steps=11)
    assert seen == list(range(11, 18))
    wanted = pretrain(
        CONFIG,
        training,
        lambda step: rows(step + 11),
        tmp_path / "third",
        start=Start(loaded, {"checkpoint": "x"}),
    )
    assert_same(weights(model), weights(wanted))
    stored = json.loads((out / "run" / "run.json").read_text())
    assert stored["origin"] == origin_of(tmp_path / "first")
    assert stored["origin"]["checkpoint"] == "first"
    assert stored["skip_steps"] == 11
    assert str(tmp_path) not in (out / "run" / "run.json").read_text()
    with pytest.raises(DataError, match="another configuration"):
        pretrain(CONFIG, training, rows, out, start=start_from(tmp_path / "first", CONFIG))


def test_another_beginning_is_refused(tmp_path: Path) -> None:
    for seed in (1, 2):
        save_model(tiny_model(CONFIG, seed), tmp_path / str(seed), torch.float32)
    run(tmp_path / "out", start=start_from(tmp_path / "1", CONFIG))
    with pytest.raises(DataError, match="another configuration"):
        run(tmp_path / "out", start=start_from(tmp_path / "2", CONFIG))
    with pytest.raises(DataError, match="another configuration"):
        run(tmp_path / "out")


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_model(tiny_model(CONFIG), tmp_path, torch.float32)
    longer = tiny_config(max_position_embeddings=256)
    assert start_from(tmp_path, longer).model.config == longer
    other = tiny_config(expert_groups=[group("all", ["text", "image"], 1)], norm_order="pre")
    with pytest.raises(DataError, match="another model than the recipe's: expert_groups .* norm_o"):
        start_from(tmp_path, other)


def test_how_much_data_a_checkpoint_has_learnt(tmp_path: Path) -> None:
    assert data_position(tmp_path) is None
    run(tmp_path / "out", skip_steps=5)
    assert data_position(tmp_path / "out") == 12
    stages = {"pretrain": {"training": {"num_steps": 30}, "skip_steps": 4}}
    (tmp_path / "training.json").write_text(json.dumps(stages))
    assert data_position(tmp_path) == 34
    (tmp_path / "training.json").write_text("{}")
    assert data_position(tmp_path) is None


# --- settings ------------------------------------------------------------------------------


def test_bfloat16_keeps_weights_and_routers_in_float32(tmp_path: Path) -> None:
    wide = run(tmp_path / "wide")
    mixed = run(tmp_path / "mixed", precision="bfloat16")
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    ours, theirs = weights(mixed), weights(wide)
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)
    router = mixed.routers()[0]
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    wanted = router.scores(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.scores(x), wanted)


def test_noise_is_used_in_training_alone(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", router_noise="none")
    noisy = run(tmp_path / "noisy", router_noise="gumbel")
    again = run(tmp_path / "again", router_noise="gumbel")
    assert_same(weights(again), weights(noisy))
    name = "blocks.0.experts.groups.0.router.weight"
    assert not torch.equal(weights(plain)[name], weights(noisy)[name])
    assert validation_losses(noisy, held_out()) == validation_losses(noisy, held_out())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_every": 0}, "log_every must be an integer >= 1, got 0"),
        ({"num_steps": 1.5}, "num_steps must be an integer >= 1, got 1.5"),
        ({"validate_every": -1}, "validate_every must be an integer >= 0, got -1"),
        ({"router_noise": "gaussian"}, "router_noise must be one of"),
        ({"precision": "float16"}, "precision must be one of"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(**changes)


def test_a_draw_of_random_numbers_elsewhere_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = weights(run(tmp_path / "a", router_noise="gumbel"))
    torch.manual_seed(2)
    random.seed(2)
    assert_same(weights(run(tmp_path / "b", router_noise="gumbel")), first)
