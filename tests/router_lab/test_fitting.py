"""Losses of auxiliary routers by hand, and variants that leave the model as it was."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from momaserve.config import RoutingPolicy
from momaserve.errors import ConfigError
from momaserve.models.moma import MomaModel
from momaserve.router_lab.passes import Lab
from momaserve.router_lab.progress import Progress
from momaserve.router_lab.selections import RouterScores
from momaserve.router_lab.source import LabData
from momaserve.router_lab.statistics import Bootstrap
from momaserve.router_lab.studies.better_routers import (
    installed,
    study_better_routers,
    variants,
)
from momaserve.router_lab.studies.thresholds import capacity_cuts
from momaserve.router_lab.study import Settings, Study
from momaserve.training.fit_routers import (
    FitRoutersConfig,
    Selections,
    auxiliary_loss,
    fit_routers,
    joint_thresholds,
    named_routers,
    new_auxiliary_routers,
    record_selections,
    routed_groups,
    router_loss,
)
from momaserve.training.packing import PackedRows
from tests.router_lab.factory import NumberWords, seen, table
from tests.training.factory import DEPTH, draw, make_packer, tiny_config, tiny_model

CONFIG = tiny_config(depth_routing=DEPTH)
SIZES = {"0.text": 2, "1.depth": 1}


def rows(step: int) -> PackedRows:
    rng = random.Random(f"rows {step}")
    return make_packer(CONFIG).documents(lambda: draw(rng), 4, 40)


def study(folder: Path, fit_steps: int = 1) -> Study:
    """Of a tiny depth-routed model whose routers were fitted for two steps."""
    model = fit_routers(
        tiny_model(CONFIG), FitRoutersConfig(num_steps=2, log_every=9), rows, folder
    )
    chosen = Settings(batches=2, bootstrap=20, fit_steps=fit_steps)
    data = LabData(
        config=CONFIG,
        splits={"train": [rows(100), rows(101)]},
        fresh_rows=rows,
        short_rows=rows,
        row_length=40,
        num_rows=4,
        text=NumberWords.tokenizer(),
        pictures=None,
        find_pictures=lambda wanted: {},
        summary="",
    )
    return Study(
        lab=Lab(model),
        data=data,
        checkpoint=folder,
        settings=chosen,
        bootstrap=Bootstrap(20, 0),
        progress=Progress(),
    )


# --- losses --------------------------------------------------------------------------------


def entry(selected: Tensor, logits: Tensor, inputs: Tensor | None = None) -> Selections:
    if inputs is None:
        inputs = torch.zeros(len(logits), 1)
    return Selections("0.text", inputs, logits, selected)


def test_losses_by_hand() -> None:
    given = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
    selected = table("x.", ".x")
    main = torch.tensor([0.9, 0.3, 0.1, 0.7]).view(2, 2).logit()
    each = [
        -torch.tensor(0.5).log(),
        -(1 - torch.tensor(2.0).sigmoid()).log(),
        -(1 - torch.tensor(-1.0).sigmoid()).log(),
        -torch.tensor(1.0).sigmoid().log(),
    ]
    plain = router_loss(given, entry(selected, main), "bce", None)
    assert_close(plain, sum(each, torch.zeros(())) / 4)
    weighted = router_loss(given, entry(selected, main), "weighted_bce", None)
    wanted = (0.9 * each[0] + 0.3 * each[1] + 0.1 * each[2] + 0.7 * each[3]) / 2.0
    assert_close(weighted, wanted)
    # A depth router has no group whose output could be compared.
    assert_close(router_loss(given, entry(selected, main), "distillation", None), plain)


def test_distillation_is_the_error_of_the_routed_output() -> None:
    model = tiny_model(CONFIG).requires_grad_(False)
    (found,) = [e for e in record_selections(model, rows(0)) if e.name == "0.image"]
    group = routed_groups(model)["0.image"]
    given = torch.randn(found.selected.shape, generator=torch.Generator().manual_seed(0))

    def routed(gates: Tensor) -> Tensor:
        total = torch.zeros_like(found.inputs)
        for e in range(gates.shape[1]):
            x = found.inputs
            hidden = F.silu(x @ group.gate_proj[e].T) * (x @ group.up_proj[e].T)
            total += (gates * found.logits.sigmoid())[:, e : e + 1] * (
                hidden @ group.down_proj[e].T
            )
        return total

    wanted = routed(found.selected.float())
    error = (routed(given.sigmoid()) - wanted).pow(2).sum(1).mean()
    value = router_loss(given, found, "distillation", group)
    assert_close(value, error / wanted.pow(2).sum(1).mean())
    sure = torch.where(found.selected, 50.0, -50.0)
    assert float(router_loss(sure, found, "distillation", group)) < 1e-9


@pytest.mark.parametrize("loss", ["weighted_bce", "distillation"])
def test_every_loss_can_be_fitted(tmp_path: Path, loss: str) -> None:
    model = tiny_model(CONFIG)
    groups = routed_groups(model)
    training = FitRoutersConfig(num_steps=40, learning_rate=0.02, warmup_steps=3, loss=loss)
    model.requires_grad_(False)
    selections = record_selections(model, rows(50))
    fresh = new_auxiliary_routers(model, training.seed)
    before, _ = auxiliary_loss(fresh, selections, loss, groups)
    fit_routers(model, training, rows, tmp_path)
    fitted = {name: r.aux for name, r in named_routers(model).items() if r.aux is not None}
    after, by_kind = auxiliary_loss(fitted, selections, loss, groups)
    assert after.item() < 0.8 * before.item()
    assert by_kind.keys() == {f"{kind}_{loss}" for kind in ("text", "image", "depth")}


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="loss must be one of .*, got 'mse'"):
        FitRoutersConfig(loss="mse")
    with pytest.raises(ConfigError, match="joint_rounds must be an integer >= 0, got -1"):
        FitRoutersConfig(joint_rounds=-1)
    with pytest.raises(ConfigError, match="joint_batches must be an integer >= 1, got 0"):
        FitRoutersConfig(joint_batches=0)


# --- joint thresholds ----------------------------------------------------------------------


def excess(model: MomaModel, batches: list[PackedRows]) -> float:
    """How far the shares that calibrated routing selects are from the capacities, on average."""
    found: dict[str, list[Tensor]] = {}
    for each in batches:
        for recorded in record_selections(model, each, RoutingPolicy.CALIBRATED):
            found.setdefault(recorded.name, []).append(recorded.selected)
    shares = [torch.cat(each).float().mean(0) for each in found.values()]
    assert len(shares) == len(named_routers(model))
    return float((torch.cat(shares) - 0.5).abs().mean())


def test_joint_thresholds_select_the_capacity_while_they_are_in_use(tmp_path: Path) -> None:
    training = FitRoutersConfig(num_steps=3, log_every=9)
    plain = fit_routers(tiny_model(CONFIG), training, rows, tmp_path / "plain")
    joint = fit_routers(
        tiny_model(CONFIG),
        replace(training, joint_rounds=4, joint_batches=5),
        rows,
        tmp_path / "joint",
    )
    batches = [rows(step) for step in range(3, 8)]
    assert excess(joint, batches) < 0.5 * excess(plain, batches)
    for name, router in named_routers(joint).items():
        other = named_routers(plain)[name]
        assert router.aux is not None
        assert other.aux is not None
        assert torch.equal(router.aux.fc1.weight, other.aux.fc1.weight)


def test_joint_thresholds_leave_the_model_as_it_is(tmp_path: Path) -> None:
    model = tiny_model(CONFIG).requires_grad_(False)
    found = joint_thresholds(model, [rows(0), rows(1)], 2)
    assert found.keys() == named_routers(model).keys()
    assert all(router.threshold_logits is None for router in named_routers(model).values())
    pooled = joint_thresholds(model, [rows(0), rows(1)], 0)
    (one,) = [e for e in record_selections(model, rows(0)) if e.name == "0.text"]
    (two,) = [e for e in record_selections(model, rows(1)) if e.name == "0.text"]
    logits = torch.cat([one.logits, two.logits])
    assert_close(pooled["0.text"], logits.quantile(0.5, dim=0))


# --- variants ------------------------------------------------------------------------------


def test_widths_and_lengths_of_the_variants() -> None:
    found = {each.name: each for each in variants(16, 100)}
    assert [each.width for each in found.values()] == [8, 2, 16, 8, 8, 8]
    assert [each.num_steps for each in found.values()] == [100, 100, 100, 25, 100, 100]
    assert {each.loss for each in found.values()} == {"bce", "weighted_bce", "distillation"}


def test_better_routers_are_better_and_nothing_is_changed(tmp_path: Path) -> None:
    lab = study(tmp_path, fit_steps=150)
    tensors = {name: tensor.clone() for name, tensor in lab.lab.model.state_dict().items()}
    auxiliary = {name: router.aux for name, router in lab.lab.routers.items()}
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = study_better_routers(lab)
    for name, tensor in lab.lab.model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert all(lab.lab.routers[name].aux is aux for name, aux in auxiliary.items())
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    rows_found = found["splits"]["train"]
    shipped = rows_found["causal, shipped"]["agreement"]
    fitted = rows_found["bce, D/2"]["agreement"]
    for kind in ("text", "image", "depth"):
        assert fitted[kind]["accuracy"]["value"] > shipped[kind]["accuracy"]["value"] + 0.05
    assert len(rows_found) == 2 + 6 + 3
    assert found["about"]["bce, D/8"]["parameters"] == 5 * 2 * 16 + 4 * (2 * 2) + 2
    for name in ("thresholds, running mean", "thresholds, pooled quantile", "thresholds, joint"):
        assert rows_found[name]["agreement"]["text"]["accuracy"]["value"] > 0.8


def test_what_is_installed_is_taken_out_again() -> None:
    routers = named_routers(tiny_model(CONFIG))
    (first, *_) = routers
    assert routers[first].aux is None
    fresh = new_auxiliary_routers(tiny_model(CONFIG), 0)
    cuts = {first: torch.ones(2)}
    with pytest.raises(RuntimeError, match="stop"), installed(routers, fresh, cuts):
        assert routers[first].aux is fresh[first]
        assert routers[first].threshold_logits is cuts[first]
        others = [r.threshold_logits for name, r in routers.items() if name != first]
        assert all(o is not None and bool(o.isinf().all()) for o in others)
        raise RuntimeError("stop")
    assert all(r.aux is None and r.threshold_logits is None for r in routers.values())


def test_cuts_select_the_capacity_that_was_asked_for(tmp_path: Path) -> None:
    lab = study(tmp_path)
    generator = torch.Generator().manual_seed(0)
    scores = RouterScores()
    for _ in range(4):
        logits = {n: torch.randn(50, e, generator=generator) for n, e in SIZES.items()}
        scores.add({name: seen(found > 9, found, 3 * found + 1) for name, found in logits.items()})
    for which in ("main", "aux"):
        for factor in (0.5, 1.0, 1.5):
            cuts = capacity_cuts(lab, scores, which, [*SIZES, "9.none"], factor)
            assert cuts.keys() == SIZES.keys()
            for name, cut in cuts.items():
                found = scores.of(name, which)
                assert found is not None
                shares = (torch.from_numpy(found) > cut).float().mean(0)
                assert shares.tolist() == [0.5 * factor] * SIZES[name]
