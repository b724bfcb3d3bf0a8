"""`momaserve bench kernels`: every kernel is there, and one that is wrong is found and named."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numba.core.dispatcher import Dispatcher

import momaserve.kernels.cpu
from momaserve.models.config import ModelConfig
from momaserve.runner.sampler import SampleRow, uniform
from momaserve.sampling import Distribution
from momaserve.tokens.grammar import Choices
from momaserve_bench.kernels import cpu_matrices
from momaserve_bench.kernels.arguments import FAMILIES
from momaserve_bench.kernels.case import KERNEL, Case, Sizes
from momaserve_bench.kernels.cpu_sampling import draw_error
from momaserve_bench.kernels.cpu_table import FAMILIES as CPU_FAMILIES
from momaserve_bench.kernels.cpu_table import cases
from momaserve_bench.kernels.timing import CopyPlan, Filler, Outcome, hold
from momaserve_server.cli import main
from tests.reference.checkpoints import CASES, random_checkpoint

PARTS = {"experts.list_pairs", "experts.multiply", "experts.multiply_gated", "attention.list_slots"}
"""Parts of `experts.routed_experts` and `attention.attend`, which are timed whole."""
QUICK = ["--rows", "1", "5", "--context", "9", "--num-iters", "2", "--roof-gib", "0.001"]
QUICK += ["--gemm-size", "32", "--memory-gib", "0.02"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def depth_config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Four experts for words and four for pictures, two depth-routed layers."""
    directory = tmp_path_factory.mktemp("depth")
    random_checkpoint(directory, seed=1, **CASES["depth_4t4i_post"])
    return ModelConfig.load(directory)


def sizes(config: ModelConfig, dtype: torch.dtype = torch.float32, **fields: Any) -> Sizes:
    values = {"rows": (1, 5), "contexts": (9, 33), "threads": 1, "seed": 0, **fields}
    return Sizes(config=config, dtype=dtype, **values)


def all_cases(these: Sizes) -> Iterator[Case]:
    for family in FAMILIES:
        yield from cases(family, these)


def outcome(case: Case) -> Outcome:
    plan = CopyPlan(copies=1, filler_bytes=0, is_cold=False)
    with torch.inference_mode():
        return hold(case.build(), plan, num_iters=1, filler=Filler(), pause_s=0.0)


# --- cases ---------------------------------------------------------------------------------


def test_every_compiled_kernel_has_a_case(depth_config: ModelConfig) -> None:
    package = momaserve.kernels.cpu
    compiled = set()
    for module in pkgutil.iter_modules(package.__path__):
        name = f"{package.__name__}.{module.name}"
        for member, value in vars(importlib.import_module(name)).items():
            if isinstance(value, Dispatcher) and value.py_func.__module__ == name:
                compiled.add(f"{module.name}.{member.removesuffix('_threaded')}")
    assert {case.kernel for case in all_cases(sizes(depth_config))} == compiled - PARTS
    assert tuple(CPU_FAMILIES) == FAMILIES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["depth_4t4i_post", "gqa_pre", "no_image_post", "uneven_pre"])
def test_kernels_agree_with_their_twins(
    tmp_path: Path, name: str, threads: int, dtype: torch.dtype
) -> None:
    random_checkpoint(tmp_path, seed=1, **CASES[name])
    for case in all_cases(sizes(ModelConfig.load(tmp_path), dtype, threads=threads)):
        found = outcome(case)
        assert not found.differing, (case, found)
        assert list(found.seconds)[0] == KERNEL
        assert len(found.seconds) >= 2


def _last(arguments: tuple[Any, ...]) -> Any:
    return arguments[-1]


OUTPUTS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "linear.linear": _last,
    "experts.routed_experts": _last,
    "attention.attend": _last,
    "attention.store": _last,
    "routing.scores": _last,
    "routing.auxiliary": _last,
    "routing.select": _last,
    "routing.count": _last,
    "glue.embed": _last,
    "glue.add": _last,
    "glue.rms_norm": _last,
    "glue.add_rms_norm": _last,
    "glue.norm_heads": lambda arguments: arguments[0],
    "glue.rotate": lambda arguments: arguments[0],
    "glue.blend": lambda arguments: arguments[0],
    "sampling.draw": lambda arguments: arguments[-2],
}
"""What each kernel writes to."""


@pytest.mark.parametrize("kernel", list(OUTPUTS))
def test_one_wrong_number_is_found(
    depth_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    module_name, function = kernel.split(".")
    module = importlib.import_module(f"momaserve.kernels.cpu.{module_name}")
    right = getattr(module, function)

    def wrong(*arguments: Any) -> None:
        right(*arguments)
        out = OUTPUTS[kernel](arguments).reshape(-1)
        if out.dtype == bool:
            out[-1] = not out[-1]
        elif kernel == "sampling.draw":
            out[-1] = 0  # bos, which nobody may draw
        else:
            out[0] += 1

    monkeypatch.setattr(module, function, wrong)
    mine = [case for case in all_cases(sizes(depth_config)) if case.kernel == kernel]
    assert mine
    for case in mine:
        assert outcome(case).differing == [KERNEL], case


def test_a_twin_that_is_wrong_is_named(
    depth_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_matrices, "has_onednn", lambda dtype: True)
    monkeypatch.setattr(cpu_matrices, "onednn_pack", lambda weight, rows: weight)
    monkeypatch.setattr(cpu_matrices, "onednn_linear", lambda x, w: 2 * x @ w.T)
    case = next(cases("linear", sizes(depth_config)))
    assert outcome(case).differing == ["onednn packed float32"]


def test_packed_products_are_left_out_where_torch_has_none(
    depth_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(weight: torch.Tensor, rows: int) -> torch.Tensor:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(cpu_matrices, "onednn_pack", fail)
    cpu_matrices.has_onednn.cache_clear()
    try:
        case = next(cases("linear", sizes(depth_config, torch.bfloat16)))
    finally:
        monkeypatch.undo()
        cpu_matrices.has_onednn.cache_clear()
    assert case.absent == ("onednn packed bfloat16",)
    assert list(outcome(case).seconds) == [KERNEL, "torch float32", "torch bfloat16"]


def test_work_of_a_product_by_hand(depth_config: ModelConfig) -> None:
    """qkv of 32 inputs and 96 outputs, 5 rows."""
    for dtype, size in zip(DTYPES, (4, 2), strict=True):
        case = [c for c in cases("linear", sizes(depth_config, dtype)) if c.what == "qkv 96x32"][1]
        assert (case.rows, case.flops) == (5, 2 * 5 * 96 * 32)
        assert case.num_bytes == size * 96 * 32 + 4 * 5 * (32 + 96)


def test_work_of_experts_by_hand(depth_config: ModelConfig) -> None:
    """Only experts that have a pair are read; groups of one shape are one case."""
    these = sizes(depth_config, torch.bfloat16, rows=(1, 5))
    found = list(cases("experts", these))
    assert [case.rows for case in found] == [1, 5]
    for case in found:
        selected = cpu_matrices.draw_selection(these, case.rows, 4)
        num_pairs, distinct = int(selected.sum()), int(selected.any(0).sum())
        assert num_pairs >= 1
        assert case.what == f"text+image 4x85x32, {num_pairs} pairs"
        assert case.flops == 2 * num_pairs * 3 * 85 * 32
        assert case.num_bytes == 2 * distinct * 3 * 85 * 32 + 2 * 4 * case.rows * 32
        assert case.touched_bytes == case.state_bytes * distinct // 4


def test_somebody_is_always_selected(depth_config: ModelConfig) -> None:
    """With a seed by which the only row would get no expert."""
    for seed in range(40):
        these = sizes(depth_config, seed=seed)
        if not bool((torch.rand(1, 4, generator=these.generator()) < 0.25).any()):
            break
    else:
        raise AssertionError("no such seed")
    assert cpu_matrices.draw_selection(these, 1, 4).tolist() == [[True, False, False, False]]
    assert cpu_matrices.draw_selection(these, 2, 1).tolist() == [[True], [True]]


def test_work_of_attention_by_hand(depth_config: ModelConfig) -> None:
    """4 heads of 8 over 9 tokens; a depth-routed layer shows a quarter of them, or so."""
    found = [c for c in cases("attention", sizes(depth_config)) if c.context == 9 and c.rows == 5]
    plain, routed = found
    assert plain.flops == 4 * 5 * 9 * 4 * 8
    assert plain.num_bytes == 2 * 5 * 9 * 4 * 8 * 4 + 2 * 4 * 5 * 4 * 8
    assert routed.what == "4/4 heads of 8, depth-routed"
    assert plain.flops / 9 <= routed.flops < plain.flops


# --- draws ---------------------------------------------------------------------------------


def row(temperature: float) -> SampleRow:
    distribution = Distribution(temperature=temperature)
    return SampleRow(choices=Choices.TEXT, distribution=distribution, seed=3, position=4)


def test_the_place_of_a_draw() -> None:
    """Four equal weights, of which one may not be drawn: thirds."""
    logits, mask = torch.zeros(4), torch.tensor([True, False, True, True])
    number = uniform(3, 4)
    places = {0: (0.0, 1 / 3), 2: (1 / 3, 2 / 3), 3: (2 / 3, 1.0)}
    for token, (begin, end) in places.items():
        expected = max(begin - number, number - end, 0.0)
        assert draw_error(logits, mask, row(1.0), token) == pytest.approx(expected)
    assert draw_error(logits, mask, row(1.0), 1) == float("inf")


def test_the_best_is_the_only_right_one_without_temperature() -> None:
    logits, mask = torch.tensor([1.0, 9.0, 3.0]), torch.tensor([True, False, True])
    errors = [draw_error(logits, mask, row(0.0), token) for token in range(3)]
    assert errors == [float("inf"), float("inf"), 0.0]


# --- the command ---------------------------------------------------------------------------


def report_of(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> dict[str, Any]:
    assert main(["bench", "kernels", *words, *QUICK]) == code
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reports_every_kernel_beside_torch(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    saved = tmp_path / "kernels.json"
    words = [str(small_checkpoint), "--dtype", dtype, "--save-result", str(saved)]
    report = report_of(capsys, 0, *words)
    assert json.loads(saved.read_text()) == report
    assert report["bench"] == "kernels"
    assert {r["kernel"] for r in report["results"]} == set(OUTPUTS) == set(report["mean_ratio"])
    assert {r["rows"] for r in report["results"]} == {1, 5}
    assert {r["context"] for r in report["results"] if r["kernel"] == "attention.attend"} == {9}
    assert report["differing"] == report["skipped"] == []
    for r in report["results"]:
        times = r["microseconds"]
        assert r["errors"].keys() == r["tolerances"].keys() == times.keys()
        assert all(r["errors"][name] <= r["tolerances"][name] for name in times)
        best = min(times[name] for name in times if name != KERNEL)
        assert times[r["best_torch"]] == best
        assert r["ratio"] == pytest.approx(best / times[KERNEL])
        seconds = times[KERNEL] / 1e6
        assert r["gb_per_s"] == pytest.approx(r["bytes"] / seconds / 1e9)
        share = r["gb_per_s"] * 1e9 / report["read_bandwidth_bytes_per_s"]
        assert r["bandwidth_share"] == pytest.approx(share)
        if r["flops"]:
            assert r["gflop_per_s"] == pytest.approx(r["flops"] / seconds / 1e9)
            share = r["gflop_per_s"] * 1e9 / report["float32_flops_per_s"]
            assert r["arithmetic_share"] == pytest.approx(share)
        assert 1 <= r["copies"] <= 2  # as many as turns
    linear = next(r for r in report["results"] if r["kernel"] == "linear.linear")
    assert f"torch {dtype}" in linear["microseconds"]
    assert report["settings"]["threads"] >= 1
    assert str(tmp_path) not in json.dumps(report)


def test_a_kernel_that_differs_ends_in_failure(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("momaserve.kernels.cpu.glue")
    right = module.add

    def wrong(x: Any, y: Any, out: Any) -> None:
        right(x, y, out)
        out[0, 0] = float("nan")

    monkeypatch.setattr(module, "add", wrong)
    words = ["bench", "kernels", str(small_checkpoint), "--kernels", "glue", *QUICK]
    assert main(words) == 1
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    named = [(one["kernel"], one["rows"], one["differing"]) for one in report["differing"]]
    assert named == [("glue.add", 1, [KERNEL]), ("glue.add", 5, [KERNEL])]
    assert sum(line.startswith("DIFFERS: glue.add, ") for line in table) == 2
    assert "glue.add" not in {r["kernel"] for r in report["results"]}
    assert "glue.rms_norm" in {r["kernel"] for r in report["results"]}


def test_warm_weights_are_one_copy(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(small_checkpoint), "--kernels", "linear"]
    for more, copies in (([], 2), (["--warm-cache"], 1)):
        report = report_of(capsys, 0, *words, *more)
        assert {r["copies"] for r in report["results"]} == {copies}
        assert not any(r["is_cold"] for r in report["results"] if "--warm-cache" in more)


def test_threads_are_as_they_were_afterwards(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    words = [str(small_checkpoint), "--kernels", "routing", "--threads", str(before + 1)]
    report = report_of(capsys, 0, *words, "--pause-ms", "0.5")
    settings = report["settings"]
    assert (settings["threads"], settings["pause_ms"]) == (before + 1, 0.5)
    assert torch.get_num_threads() == before


def test_what_needs_too_much_memory_is_left_out_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["bench", "kernels", "--preset", "moma-90m-4t4i", "--kernels", "linear", *QUICK]
    assert main(words) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["settings"]["model"] == "moma-90m-4t4i"
    assert [(one["what"], one["rows"]) for one in report["skipped"]] == [
        ("head 65536x512", 1),
        ("head 65536x512", 5),
    ]
    lines = [line for line in table if line.startswith("left out: linear.linear (head")]
    assert len(lines) == 2
    assert all("--memory-gib is 0.02" in line for line in lines)


def test_without_numba_there_is_nothing_to_measure(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "numba" else find(name)
    )
    assert main(["bench", "kernels", str(small_checkpoint), *QUICK]) == 2
    assert "cpu: numba is not installed (pip install 'momaserve[cpu]')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "4", "0"], "--rows must be at least 1, got 0"),
        (["--context", "0"], "--context must be at least 1, got 0"),
        (["--num-iters", "0"], "--num-iters must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--gemm-size", "0"], "--gemm-size must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--memory-gib", "0"], "--memory-gib must be above 0, got 0.0"),
        (["--memory-gib", "nan"], "--memory-gib must be above 0, got nan"),
        (["--memory-gib", "1e-9"], "--memory-gib 1e-09 is too little for any of these kernels"),
        (["--roof-gib", "inf"], "--roof-gib must be above 0, got inf"),
        (["--roof-gib", "0.0001"], "at least 1048576 bytes, got 107374"),
        (["--pause-ms", "-1"], "--pause-ms must be at least 0, got -1.0"),
        (["--save-result", "no/where"], "--save-result no/where cannot be written"),
        (["--preset", "moma-1b"], "no preset is called 'moma-1b'"),
    ],
)
def test_settings_that_cannot_work(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["bench", "kernels", *QUICK, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_or_a_preset(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(small_checkpoint), "--preset", "moma-90m-dense"]
    assert main(["bench", "kernels", *words]) == 2
    assert f"give CHECKPOINT {small_checkpoint} or --preset" in capsys.readouterr().err
    assert main(["bench", "kernels", str(small_checkpoint.parent / "none")]) == 1
    assert "config.json does not exist" in capsys.readouterr().err
