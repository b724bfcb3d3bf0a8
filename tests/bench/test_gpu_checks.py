"""`benchmarks/gpu.sh check`: right kernels pass, and a wrong one is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.bench.gpu_stub import StubDevice, tiny  # first: it chooses the interpreter

# isort: split
from momaserve.errors import ConfigError
from momaserve.kernels.triton import attention, depth, experts, heads, norms, routing, sampling
from momaserve_bench.gpu import checks
from momaserve_bench.gpu.device import Budget
from momaserve_bench.gpu.draws import Draw, draw_error
from momaserve_bench.gpu.findings import Check, Finding, error_of, num_differing, run_checks
from momaserve_bench.gpu.kernel_checks import FULL, Sizes, kernel_checks
from momaserve_bench.gpu.step_checks import FULL as FULL_STEPS
from momaserve_bench.gpu.step_checks import StepSizes, step_checks
from tests.kernels.triton.device import DEVICE
from tests.kernels.triton.fat import fatten

WHERE = torch.device(DEVICE)
SIZES = Sizes(
    width=42,
    aux=21,
    inner=19,
    rows=(1, 5, 21),
    heads=((2, 1),),
    head_dims=(16,),
    contexts=(1, 17, 70),
    chunks=((5, 5), (9, 20), (1, 4), (0, 0)),
    splits=(1, 3),
    vocab=61,
    groups=("4t4i", "3t1i"),
)
ARCHITECTURES = ("moma-90m-4t4i", "moma-mod-110m-4t4i")
STEP_SIZES = StepSizes(
    configs={name: tiny(name) for name in ARCHITECTURES},
    narrow_names=ARCHITECTURES[:1],
    narrow=torch.float16,
    chunks=(5, 3, 9),
    contexts=(1, 9, 4),
)


@pytest.fixture(autouse=True)
def _fat_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        fatten(monkeypatch)


def budget() -> Budget:
    return Budget(StubDevice(), 1e9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_kernels_pass(dtype: torch.dtype) -> None:
    """float32 with fewer sizes: the interpreter takes its time."""
    found = run_checks(kernel_checks(3, WHERE, dtype, SIZES), StubDevice(), budget())
    assert [one for one in found if not one.passed] == []
    assert {one.kernel for one in found} == set(WRONG)


def offset(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(offset(part) for part in result)
    return result.add_(1) if result.dtype.is_floating_point else result + 1


def shifted_weights(pairs: Any) -> Any:
    pairs.weights.add_(0.01)
    return pairs


def shifted_slots(rows: Any) -> Any:
    rows.slots.add_(1)
    return rows


def next_ids(result: Any) -> Any:
    return (result[0] + 1) % SIZES.vocab, result[1]


WRONG: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "norms.rms_norm": (norms, offset),
    "norms.add_normed": (norms, offset),
    "norms.normed_sum": (norms, offset),
    "heads.place_heads": (heads, offset),
    "attention.paged_attention": (attention, offset),
    "routing.route": (routing, shifted_weights),
    "experts.experts": (experts, offset),
    "depth.take": (depth, shifted_slots),
    "depth.gather": (depth, offset),
    "depth.blend": (depth, offset),
    "sampling.draw": (sampling, next_ids),
}
"""By kernel: its module, and what a broken one makes of the right result."""


@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_result_fails(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, spoil = WRONG[kernel]
    name = kernel.split(".")[1]
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    check = next(
        one for one in kernel_checks(3, WHERE, torch.float32, SIZES) if one.kernel == kernel
    )
    (found,) = run_checks([check], StubDevice(), budget())
    assert found.kernel == kernel and not found.passed and not found.note


def test_whole_steps_and_graphs_pass() -> None:
    found = run_checks(step_checks(3, WHERE, STEP_SIZES), StubDevice(), budget())
    assert [one for one in found if not one.passed] == []
    # A step and three kinds of rows, of each model and of the one in 16 bits.
    assert [one.kernel for one in found] == (["whole step"] + ["graph = launches"] * 3) * 3


def test_a_wrong_norm_is_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    right = norms.add_normed
    monkeypatch.setattr(norms, "add_normed", lambda *args, **kw: right(*args, **kw).mul_(1.01))
    (found,) = run_checks([next(step_checks(3, WHERE, STEP_SIZES))], StubDevice(), budget())
    assert not found.passed and not found.note


def test_the_report_names_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(norms, "rms_norm", broken)
    package = "momaserve_bench.gpu"
    monkeypatch.setattr(f"{package}.kernel_checks.kernel_checks", norm_checks)
    monkeypatch.setattr(f"{package}.step_checks.step_checks", lambda *_: iter(()))
    report = checks.check(StubDevice(), budget(), seed=3, dtype=torch.float32, sizes=SIZES)
    assert (report["num_checks"], report["failed"], report["seed"]) == (6, 2, 3)
    assert report["findings"][0] == {
        "kernel": "norms.rms_norm",
        "what": "1 rows of 42",
        "error": "inf",
        "tolerance": 3e-5,
        "passed": False,
        "note": "RuntimeError: no such instruction",
    }
    out = capsys.readouterr().out
    assert "FAILS: norms.rms_norm (1 rows of 42): RuntimeError: no such instruction" in out
    assert "norms.add_normed" in out and "seed 3" in out


def norm_checks(*args: Any) -> Any:
    return (one for one in kernel_checks(*args) if one.kernel.startswith("norms."))


def test_what_there_was_no_time_for_has_failed() -> None:
    check = Check("a kernel", "somewhere", 1.0, lambda: 0.0)
    (found,) = run_checks([check], StubDevice(), Budget(StubDevice(), 1e-9))
    assert not found.passed
    assert found.note == "left out: the 1e-09 s of this call were over"


def test_a_device_beyond_use_is_asked_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(StubDevice):
        def synchronize(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    def fails() -> float:
        raise RuntimeError("launch failed")

    def never() -> float:
        raise AssertionError("it was asked")

    kept: list[int] = []
    names = [("a", fails), ("a", never), ("b", never)]
    every = [Check(name, "here", 1.0, error) for name, error in names]
    found = run_checks(every, Broken(), budget(), lambda so_far: kept.append(len(so_far)))
    assert [one.note for one in found] == [
        "RuntimeError: launch failed",
        *["left out: the device is beyond use after a failure: RuntimeError: an illegal memory "
          "access was encountered"] * 2,
    ]  # fmt: skip
    assert kept == [0, 2]
    assert capsys.readouterr().out.splitlines() == [
        "checking a",
        "FAILS: a (here): RuntimeError: launch failed",
        "checking b",
    ]


def test_some_kernels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    package = "momaserve_bench.gpu"
    monkeypatch.setattr(f"{package}.kernel_checks.kernel_checks", norm_checks)
    monkeypatch.setattr(f"{package}.step_checks.step_checks", lambda *_: iter(()))
    kept: list[Any] = []
    options: Any = {"seed": 3, "dtype": torch.float32, "sizes": SIZES, "keep": kept.append}
    report = checks.check(StubDevice(), budget(), only="add_n", **options)
    assert {one["kernel"] for one in report["findings"]} == {"norms.add_normed"}
    assert kept[0]["num_checks"] == 0
    with pytest.raises(ConfigError, match="--only 'nothing' is in no kernel's name"):
        checks.check(StubDevice(), budget(), only="nothing", **options)


def test_errors_are_shares_of_the_largest_value() -> None:
    wanted = torch.tensor([1.0, -4.0])
    assert error_of(torch.tensor([1.0, -3.0]), wanted) == 0.25
    assert error_of(torch.tensor([1.0, math.nan]), wanted) == math.inf
    assert error_of(wanted[:1], wanted) == math.inf
    assert error_of(wanted[:0], wanted[:0]) == 0.0
    assert num_differing(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 0])) == 2
    assert num_differing(torch.tensor([1]), torch.tensor([1, 0])) == math.inf
    never = Finding(kernel="k", what="w", error=math.nan, tolerance=1.0)
    assert not never.passed


def test_draws_are_judged_by_their_distance() -> None:
    scores = torch.tensor([0.0, math.log(2.0), -math.inf, 0.0])  # weights 1, 2, none, 1
    plain = Draw()
    assert draw_error(scores, plain, 0.1, 0) == 0
    assert draw_error(scores, plain, 0.3, 1) == 0
    assert draw_error(scores, plain, 0.3, 0) == pytest.approx(0.05)
    assert draw_error(scores, plain, 0.3, 2) == math.inf
    assert draw_error(scores, Draw(temperature=0), 0.9, 1) == 0
    assert draw_error(scores, Draw(temperature=0), 0.9, 3) == math.inf
    assert draw_error(scores, Draw(top_k=1), 0.9, 1) == 0
    assert draw_error(scores, Draw(top_k=1), 0.9, 0) == math.inf
    # By rank 1, 0, 3; the first two make 0.6 of all.
    assert draw_error(scores, Draw(top_p=0.6), 0.9, 0) == 0
    assert draw_error(scores, Draw(top_p=0.6), 0.9, 3) == pytest.approx(0.1)
    assert draw_error(scores, Draw(min_p=0.6), 0.9, 1) == 0
    assert draw_error(scores, plain, 0.5, 99) == math.inf


def test_the_full_sizes_reach_every_way_of_the_kernels() -> None:
    assert {experts.use_direct(rows) for rows in FULL.rows} == {True, False}
    assert any(rows > 512 for rows in FULL.rows)  # the tiles of many rows
    names = " ".join(FULL_STEPS.configs)
    for architecture in ("4t4i", "dense", "moe-8x", "1t1i", "mod-"):
        assert architecture in names
