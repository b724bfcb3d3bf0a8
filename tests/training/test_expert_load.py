"""What the log says about experts, against a slow count; and the noise of upcycled routers."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from momaserve.training.expert_load import ExpertLoad
from momaserve.training.fit_routers import SelectionRecorder
from momaserve.training.forward import forward_batch, token_losses
from momaserve.training.packing import PackedRows
from momaserve.training.router_noise import GumbelNoise, noise_of_step
from tests.models.factory import group
from tests.training.factory import draw, make_packer, tiny_config, tiny_model


def make_rows(seed: int = 0) -> PackedRows:
    rng = random.Random(seed)
    return make_packer(tiny_config()).documents(lambda: draw(rng), 3, 30)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_shares_without_expert_and_affinities(is_mixed: bool) -> None:
    groups = [group("any", ["text", "image"], 3)] if is_mixed else None
    config = tiny_config(**({"expert_groups": groups} if groups else {}))
    model, rows = tiny_model(config), make_rows()
    load, recorder = ExpertLoad(config, rows), SelectionRecorder(rows)
    for observer in (load, recorder):
        with torch.no_grad():
            model(forward_batch(config, rows, observer=observer))
    ids = rows.token_ids.flatten()[~rows.is_padding.flatten()]
    is_image = (ids >= 4) & (ids < 20)
    wanted: dict[str, list[float]] = {}
    for entry in recorder.selections:
        for name, mine in (("text", ~is_image), ("image", is_image)):
            if is_mixed:
                chosen, logits = entry.selected[mine], entry.logits[mine]
            elif entry.name.endswith(name):
                chosen, logits = entry.selected, entry.logits
            else:
                continue
            sums = wanted.setdefault(name, [0.0] * 4)
            for taken, scores in zip(chosen.tolist(), logits.sigmoid().tolist(), strict=True):
                sums[0] += 1
                sums[1] += not any(taken)
                sums[2] += sum(taken)
                sums[3] += sum(s for t, s in zip(taken, scores, strict=True) if t)
    report = load.report()
    assert len(report) == 4
    for name, (tokens, without, pairs, affinity) in wanted.items():
        assert report[f"{name}_without_expert"] == pytest.approx(without / tokens)
        assert report[f"{name}_affinity"] == pytest.approx(affinity / pairs)


def test_single_experts_have_no_load() -> None:
    config = tiny_config(expert_groups=[group("all", ["text", "image"], 1)])
    rows = make_rows()
    load = ExpertLoad(config, rows)
    with torch.no_grad():
        tiny_model(config)(forward_batch(config, rows, observer=load))
    assert load.report() == {}


# --- noise ---------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_step() -> None:
    logits = torch.zeros(5, 4)

    def drawn(seed: int, step: int) -> list[Tensor]:
        noise = noise_of_step("gumbel", seed, step)
        assert noise is not None
        return [noise(logits), noise(logits)]

    torch.manual_seed(3)
    first, second = drawn(0, 7)
    torch.manual_seed(4)
    assert all(map(torch.equal, drawn(0, 7), (first, second)))
    assert not torch.equal(first, second)
    assert not torch.equal(first, drawn(0, 8)[0])
    assert not torch.equal(first, drawn(1, 7)[0])
    assert noise_of_step(None, 0, 7) is None
    assert noise_of_step("none", 0, 7) is None


def test_noise_is_the_difference_of_two_gumbels() -> None:
    """Its mean is 0, its variance pi^2 / 3, and it is logistic: P(x < t) = sigmoid(t)."""
    noise = GumbelNoise(0, 0)(torch.zeros(200_000, 1)).squeeze(1)
    assert noise.dtype == torch.float32
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.var()) == pytest.approx(torch.pi**2 / 3, rel=0.02)
    uniform = torch.rand(2, 200_000, generator=torch.Generator().manual_seed(1))
    gumbels = -(-uniform.log()).log()
    difference = gumbels[0] - gumbels[1]
    for cut in (-2.0, -0.5, 1.0, 3.0):
        share = float((noise < cut).float().mean())
        assert share == pytest.approx(torch.tensor(cut).sigmoid().item(), abs=0.005)
        assert share == pytest.approx(float((difference < cut).float().mean()), abs=0.005)


def test_noise_moves_selection_and_weight_and_gradients_flow() -> None:
    config = tiny_config()
    model, rows = tiny_model(config), make_rows()
    recorders = {}
    for name in ("none", "gumbel"):
        recorders[name] = SelectionRecorder(rows)
        noise = noise_of_step(name, 0, 0)
        batch = forward_batch(config, rows, observer=recorders[name], noise=noise)
        losses, _ = token_losses(model, rows, batch)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    for router in model.routers():
        assert router.weight.grad is not None
        assert float(router.weight.grad.abs().sum()) > 0
    plain, noisy = (recorders[name].selections[0] for name in ("none", "gumbel"))
    assert torch.equal(plain.inputs, noisy.inputs)
    assert not torch.equal(plain.selected, noisy.selected)
    assert torch.equal(plain.selected.sum(0), noisy.selected.sum(0))
    kth = noisy.logits.masked_fill(~noisy.selected, float("inf")).amin(0)
    assert bool(((noisy.logits >= kth) == noisy.selected).all())  # by the noisy scores
