"""Fitted routers imitate expert choice, thresholds are k-th best scores; how that is measured."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from momaserve.config import RoutingPolicy
from momaserve.errors import DataError
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.weights import load_model
from momaserve.training.evaluate import Agreement, loss_by_policy, router_agreement
from momaserve.training.fit_routers import (
    FitRoutersConfig,
    fit_routers,
    named_routers,
    record_selections,
)
from momaserve.training.forward import forward_batch, token_losses
from momaserve.training.packing import PackedRows
from momaserve.training.tasks import Exchange
from tests.models.factory import group
from tests.training.factory import (
    DEPTH,
    draw,
    make_packer,
    tiny_config,
    tiny_model,
    words_only,
)

CAUSAL, CALIBRATED = RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED
EXPERT_CHOICE, THRESHOLD = RoutingPolicy.EXPERT_CHOICE, RoutingPolicy.THRESHOLD
DEPTH_CONFIG = tiny_config(depth_routing=DEPTH)


def rows_for(
    config: ModelConfig, drawn: Callable[[random.Random], Exchange] = draw
) -> Callable[[int], PackedRows]:
    def rows(step: int) -> PackedRows:
        rng = random.Random(f"rows {step}")
        return make_packer(config).documents(lambda: drawn(rng), 4, 40)

    return rows


def kth_best_scores(model: MomaModel, rows: PackedRows) -> dict[str, Tensor]:
    """Sigmoid of each expert's k-th best logit over the tokens that it may take."""
    config = model.config
    found: dict[str, Tensor] = {}
    for entry in record_selections(model, rows):
        num_tokens, num_experts = entry.logits.shape
        share = num_tokens // num_experts
        if entry.name.endswith("depth"):
            assert config.depth_routing is not None
            share = int((config.depth_routing.capacity_of(1) or 0) * num_tokens)
        best = entry.logits.sort(dim=0, descending=True).values
        found[entry.name] = best[max(1, share) - 1].sigmoid()
    return found


def thresholds_of(model: MomaModel) -> dict[str, Tensor]:
    found = {}
    for name, router in named_routers(model).items():
        assert router.threshold_logits is not None
        found[name] = router.threshold_logits.sigmoid()
    return found


# --- what is recorded ----------------------------------------------------------------------


def test_selections_are_told_for_every_router_and_real_token() -> None:
    model, rows = tiny_model(DEPTH_CONFIG), rows_for(DEPTH_CONFIG)(0)
    entries = {entry.name: entry for entry in record_selections(model, rows)}
    assert list(entries) == ["0.text", "0.image", "1.depth", "1.text", "1.image"]
    assert entries.keys() == named_routers(model).keys()
    is_image = (rows.token_ids >= 4) & (rows.token_ids < 20)
    num_image = int(is_image.sum())
    num_real = int((~rows.is_padding).sum())
    assert len(entries["0.image"].inputs) == num_image
    assert len(entries["0.text"].inputs) == num_real - num_image
    assert len(entries["1.depth"].inputs) == num_real
    assert int(entries["1.depth"].selected.sum()) == num_real // 2
    taken = len(entries["1.text"].inputs) + len(entries["1.image"].inputs)
    assert taken == num_real // 2  # experts choose among the tokens that the layer took
    for name in ("0.text", "0.image", "1.text", "1.image"):
        entry = entries[name]
        assert entry.selected.sum(0).tolist() == [len(entry.inputs) // 2] * 2
        assert entry.inputs.shape == (len(entry.inputs), 16)
        router = named_routers(model)[name]
        assert_close(router.scores(entry.inputs), entry.logits)


# --- thresholds ----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [tiny_config(), DEPTH_CONFIG], ids=["plain", "depth"])
def test_thresholds_are_the_kth_best_scores(tmp_path: Path, config: ModelConfig) -> None:
    model, rows = tiny_model(config), rows_for(config)
    wanted = kth_best_scores(model, rows(0))
    fit_routers(model, FitRoutersConfig(num_steps=1), rows, tmp_path)
    got = thresholds_of(model)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(got[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_thresholds_are_means_over_steps(tmp_path: Path, decay: float) -> None:
    """A true mean until the weight of a new value is down to 1 - decay."""
    config = tiny_config()
    model, rows = tiny_model(config), rows_for(config)
    each = [kth_best_scores(model, rows(step)) for step in range(5)]
    fit_routers(model, FitRoutersConfig(num_steps=5, threshold_decay=decay), rows, tmp_path)
    for name, got in thresholds_of(model).items():
        mean = each[0][name]
        for count, scores in enumerate(each[1:], start=2):
            mean = mean + max(1 - decay, 1 / count) * (scores[name] - mean)
        assert_close(got, mean, rtol=1e-5, atol=1e-6)
        if decay == 0.99:
            assert_close(got, torch.stack([s[name] for s in each]).mean(0), rtol=1e-5, atol=1e-6)


def test_calibrated_routing_cuts_at_the_kth_best(tmp_path: Path) -> None:
    config = tiny_config()
    model, rows = tiny_model(config), rows_for(config)
    fit_routers(model, FitRoutersConfig(num_steps=1), rows, tmp_path)
    for entry in record_selections(model, rows(0)):
        if not entry.name.startswith("0."):
            continue
        threshold = named_routers(model)[entry.name].threshold_logits
        assert threshold is not None
        # Tokens of one id at the beginning of documents tie; the cut itself is as good as any.
        assert bool(entry.selected[entry.logits > threshold + 1e-5].all())
        assert not bool(entry.selected[entry.logits < threshold - 1e-5].any())


# --- fitting -------------------------------------------------------------------------------


def test_fitting_improves_agreement_and_touches_nothing_else(tmp_path: Path) -> None:
    config = DEPTH_CONFIG
    model, rows = tiny_model(config), rows_for(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unseen = [rows(1000 + step) for step in range(3)]
    (tmp_path / "short").mkdir()
    fit_routers(tiny_model(config), FitRoutersConfig(num_steps=1), rows, tmp_path / "short")
    short = load_model(tmp_path / "short", config, dtype=torch.float32, device=torch.device("cpu"))
    training = FitRoutersConfig(num_steps=80, learning_rate=0.02, warmup_steps=5, log_every=1000)
    fit_routers(model, training, rows, tmp_path)
    first = router_agreement(short, unseen)[CAUSAL]
    fitted = router_agreement(model, unseen)[CAUSAL]
    assert fitted.keys() == {"text", "image", "depth"}
    for kind, agreement in fitted.items():
        assert agreement.accuracy > 0.75, kind
        assert agreement.f1 > first[kind].f1, kind
        assert agreement.accuracy > first[kind].accuracy + 0.05, kind
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def test_a_batch_without_pictures_spoils_nothing(tmp_path: Path) -> None:
    """Its image routers have nothing to learn from, and their thresholds nothing to average."""
    config = tiny_config()
    plain, words = rows_for(config), rows_for(config, words_only)
    order = [words(0), plain(0), words(1), plain(1)]
    model = tiny_model(config)
    scores = [kth_best_scores(model, rows) for rows in (plain(0), plain(1))]
    fit_routers(model, FitRoutersConfig(num_steps=4), lambda step: order[step], tmp_path)
    for name, tensor in model.state_dict().items():
        assert bool(tensor.isfinite().all()), name
    for name, got in thresholds_of(model).items():
        if name.endswith("image"):
            mean = (scores[0][name] + scores[1][name]) / 2
            assert_close(got, mean, rtol=1e-5, atol=1e-6)
    assert set(router_agreement(model, [words(2)])[CAUSAL]) == {"text"}


def test_batches_for_which_nothing_is_to_be_learnt(tmp_path: Path) -> None:
    config = tiny_config(expert_groups=[group("text", ["text"], 1), group("image", ["image"], 2)])
    plain, words = rows_for(config), rows_for(config, words_only)
    model = tiny_model(config)
    fit_routers(
        model, FitRoutersConfig(num_steps=2), lambda step: (words, plain)[step](0), tmp_path
    )
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_a_model_without_routers_is_refused(tmp_path: Path) -> None:
    config = tiny_config(expert_groups=[group("all", ["text", "image"], 1)])
    with pytest.raises(DataError, match="this model has no routers to fit"):
        fit_routers(tiny_model(config), FitRoutersConfig(), rows_for(config), tmp_path)


# --- evaluation ----------------------------------------------------------------------------


def test_agreement_counts_by_hand() -> None:
    agreement = Agreement()
    selected = torch.tensor([[True, True], [False, False], [True, False]])
    wanted = torch.tensor([[True, False], [False, True], [True, False]])
    agreement.add(selected, wanted)
    assert agreement == Agreement(2, 1, 1, 2)
    assert agreement.accuracy == 4 / 6
    assert agreement.f1 == 4 / 6
    agreement.add(torch.tensor([[True]]), torch.tensor([[True]]))
    assert agreement == Agreement(3, 1, 1, 2)
    assert agreement.accuracy == 5 / 7
    assert agreement.f1 == 6 / 8


@pytest.mark.parametrize(
    ("counts", "accuracy", "f1"),
    [
        ((0, 0, 0, 0), 0.0, 0.0),
        ((0, 0, 0, 5), 1.0, 0.0),
        ((5, 0, 0, 0), 1.0, 1.0),
        ((0, 3, 2, 0), 0.0, 0.0),
        ((1, 0, 3, 0), 0.25, 0.4),
    ],
)
def test_agreement_at_its_edges(
    counts: tuple[int, int, int, int], accuracy: float, f1: float
) -> None:
    assert (Agreement(*counts).accuracy, Agreement(*counts).f1) == (accuracy, f1)


def test_agreement_is_told_for_what_the_model_has() -> None:
    config = tiny_config()
    model, rows = tiny_model(config), rows_for(config)(0)
    found = router_agreement(model, [rows])
    assert found.keys() == {THRESHOLD}
    entries = record_selections(model, rows)
    wanted = {"text": Agreement(), "image": Agreement()}
    for entry in entries:
        wanted[entry.name.partition(".")[2]].add(entry.logits > 0, entry.selected)
    assert found[THRESHOLD] == wanted


def test_agreement_of_the_oracle_with_itself(tmp_path: Path) -> None:
    """Thresholds just below the k-th best score select what expert choice does, and its ties."""
    config = tiny_config()
    model, rows = tiny_model(config), rows_for(config)(0)
    for entry in record_selections(model, rows):
        lowest = entry.logits.masked_fill(~entry.selected, float("inf")).amin(0)
        named_routers(model)[entry.name].threshold_logits = lowest - 1e-6
    for agreement in router_agreement(model, [rows])[CALIBRATED].values():
        assert agreement.false_negative == 0
        assert agreement.accuracy > 0.97


def test_loss_by_policy_is_the_mean_over_learnt_tokens(tmp_path: Path) -> None:
    config = tiny_config()
    model, rows = tiny_model(config), rows_for(config)
    fit_routers(model, FitRoutersConfig(num_steps=2), rows, tmp_path)
    batches = [rows(5), rows(6)]
    policies = [EXPERT_CHOICE, CAUSAL, CALIBRATED, THRESHOLD]
    found = loss_by_policy(model, batches, policies)
    assert list(found) == policies
    for policy, values in found.items():
        sums: dict[str, list[float]] = {"text": [], "image": []}
        for batch in batches:
            losses, is_image = token_losses(
                model, batch, forward_batch(config, batch, RoutingPolicy(policy))
            )
            sums["text"] += losses[~is_image].tolist()
            sums["image"] += losses[is_image].tolist()
        for modality, all_losses in sums.items():
            assert values[modality] == pytest.approx(sum(all_losses) / len(all_losses), rel=1e-5)
    assert len({round(values["text"], 6) for values in found.values()}) == 4


def test_loss_of_text_alone_has_no_image_part() -> None:
    config = tiny_config()
    model, rows = tiny_model(config), rows_for(config, words_only)
    (values,) = loss_by_policy(model, [rows(0)], [THRESHOLD]).values()
    assert values["text"] > 0
    assert values["image"] == 0.0


def test_reports_are_plain_data() -> None:
    """Policies are keys of JSON reports."""
    config = tiny_config()
    model: Any = tiny_model(config)
    assert "threshold" in router_agreement(model, [rows_for(config)(0)])
    assert "threshold" in loss_by_policy(model, [rows_for(config)(0)], [THRESHOLD])
