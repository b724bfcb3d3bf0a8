"""`benchmarks/gpu.sh`: what is measured, printed and refused; a stub stands in for the GPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.gpu_stub import StubDevice, tiny, tiny_parts  # first: it chooses the interpreter

# isort: split
from momaserve.config import CacheConfig, EngineConfig, SchedulerConfig
from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve.models.presets import preset_config
from momaserve_bench.gpu import __main__ as command
from momaserve_bench.gpu import peers, timing
from momaserve_bench.gpu.device import Budget, CudaDevice, time_on
from momaserve_bench.gpu.first_token import first_token
from momaserve_bench.gpu.peers import Pair, PeerSizes, compare, nearest
from momaserve_bench.gpu.startup import StartUpError, start_up
from momaserve_bench.gpu.timing import TimingSizes, time_all
from tests.kernels.triton.device import DEVICE

ROOT = Path(__file__).parents[2]
PRESET = "moma-90m-4t4i"
SIZES = TimingSizes(
    preset=PRESET,
    buffer_bytes=1 << 16,
    gemm_size=16,
    dtype="float32",
    num_runs=2,
    num_warmup=1,
    attention_batch=2,
    attention_context=20,
    heads=(2, 1),
    head_dim=16,
    decodes=(("text", 1), ("image", 1), ("mixed", 2)),
    input_len=5,
    output_len=4,
    prefill_batch=2,
    prefill_len=9,
    kv_cache_bytes=1 << 22,
    startup_timeout_s=60.0,
)
STARTED = {"imported_s": 1.0, "loaded_s": 2.0, "first_token_s": 3.0, "second_token_s": 3.5}
CHILD = (sys.executable, "-c", f"print('noise'); print('{json.dumps(STARTED)}')")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def plain_engine(preset: str, num_requests: int) -> Engine:
    config = EngineConfig(
        device=DEVICE,
        backend="reference",
        cache=CacheConfig(kv_cache_bytes=1 << 22),
        scheduler=SchedulerConfig(max_num_requests=num_requests),
    )
    return Engine(tiny_parts(preset, 4, config), config)


# --- the clock -----------------------------------------------------------------------------


def test_times_are_of_one_piece_of_work() -> None:
    device = StubDevice()
    count = 0

    def work() -> None:
        nonlocal count
        count += 1
        device.now()  # a millisecond

    times = time_on(device, work, num_runs=3, num_warmup=2, inner=4)
    assert count == 2 + 3 * 4
    assert times.num_runs == 3
    assert times.median_s == pytest.approx(5e-3 / 4)
    assert device.num_waits == 1


def test_a_budget_is_spent_once_its_time_is_over() -> None:
    budget = Budget(StubDevice(), 0.0025)
    assert [budget.is_spent for _ in range(4)] == [False, False, True, True]


# --- time ----------------------------------------------------------------------------------


def test_all_sections_and_their_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    device, kept = StubDevice(), []
    report = time_all(
        device,
        Budget(device, 1e9),
        seed=1,
        sizes=SIZES,
        make_parts=tiny_parts,
        startup_command=CHILD,
        backend="reference",
        keep=lambda found: kept.append(sorted(found)),
    )
    assert report["failures"] == {} and report["left_out"] == []
    assert report["peak_bytes"] == 7
    # Marks are a millisecond apart, so two reads of 64 KiB back to back take half of one each.
    assert report["roofs"]["read_bytes_per_s"] == pytest.approx((1 << 16) / 0.5e-3)
    assert report["roofs"]["gemm_flops_per_s"] == pytest.approx(2 * 16**3 / 0.25e-3)
    attention = report["attention"]
    assert attention["bytes"] == 2 * 2 * 20 * 1 * 16 * 4
    assert attention["us"] == pytest.approx(1e3 / 20)
    assert attention["share"] == pytest.approx(
        attention["bytes"] / 0.05e-3 / report["roofs"]["read_bytes_per_s"]
    )
    assert report["startup"]["target_s"] == 60
    assert report["startup"]["compiled"]["first_token_s"] == 3.0
    decoding = report["decoding"]
    assert [(one["modality"], one["batch_size"]) for one in decoding] == list(SIZES.decodes)
    assert all(one["roof"]["bytes_per_step"] > 0 < one["roof"]["share"] for one in decoding)
    prefill = report["prefill"]
    assert prefill["flops"] > 0 and prefill["share"] > 0
    assert prefill["tokens_per_s"] == pytest.approx(18 / prefill["prefill_s"])
    assert [(one["kind"], one["batch_size"]) for one in report["steps"]] == list(SIZES.decodes)
    for one in report["steps"]:
        assert one["host_ms"] == pytest.approx(1) and one["whole_ms"] == pytest.approx(2)
        assert one["forward_ms"] == pytest.approx(0.1)
        assert one["device_ms"] == pytest.approx(2) and one["num_kernels"] == 3
        assert one["kernels"] == [{"name": "a_kernel", "ms": pytest.approx(2), "count": 3}]
    assert len(kept) == 6 and "roofs" in kept[0] and "steps" in kept[-1]
    json.dumps(report)
    out = capsys.readouterr().out
    for title in ("roofs", "paged attention", "start-up", "decodes", "reads prompts", "one step"):
        assert title in out


def test_a_failed_section_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    for section in ("decoding", "prefill", "steps"):
        monkeypatch.setattr(timing._Bench, section, lambda _: {})
    monkeypatch.setattr(timing._Bench, "attention", fail)
    command_ = (sys.executable, "-c", "raise SystemExit('no compiler')")
    device = StubDevice()
    report = time_all(device, Budget(device, 1e9), seed=1, sizes=SIZES, startup_command=command_)
    assert report["failures"] == {
        "attention": "RuntimeError: out of memory",
        "startup": "StartUpError: the process ended with status 1: no compiler",
    }
    assert report["decoding"] == {}


def test_sections_without_time_are_left_out() -> None:
    device = StubDevice()
    report = time_all(device, Budget(device, 1e-9), seed=1, sizes=SIZES)
    assert report["left_out"] == [
        "roofs", "attention", "decoding", "prefill", "steps", "startup",
    ]  # fmt: skip
    assert report["failures"] == {}


def test_a_start_that_takes_too_long() -> None:
    waits = (sys.executable, "-c", "import signal; signal.pause()")
    with pytest.raises(StartUpError, match=r"no first token after 0\.05 s"):
        start_up(waits, timeout_s=0.05)


def test_a_first_token_comes_after_the_engine() -> None:
    found = first_token(PRESET, 0.0, lambda preset, _: plain_engine(preset, 1))
    assert 0 < found["loaded_s"] < found["first_token_s"] < found["second_token_s"]


# --- peers ---------------------------------------------------------------------------------

PEER_SIZES = PeerSizes(
    pairs=(
        Pair(name="dense", preset="moma-90m-dense", is_compiled=True),
        Pair(name="4t4i", preset=PRESET, is_compiled=False),
    ),
    batch_sizes=(1, 2),
    input_len=5,
    output_len=4,
    rounds=2,
    num_warmup=1,
    dtype="float32",
    kv_cache_bytes=1 << 22,
)


class StubPeer:
    """As fast as it is told; remembers what it was asked."""

    name = "stub"

    def __init__(self, rate: float) -> None:
        self.settings = {"version": "1"}
        self.asked: list[tuple[list[list[int]], int]] = []
        self._rate = rate

    def run(self, prompts: list[list[int]], num_new: int) -> float:
        self.asked.append((prompts, num_new))
        if math.isnan(self._rate):
            raise RuntimeError("out of memory\nand so on")
        return self._rate


def compare_with(make_peer: Any, sizes: PeerSizes = PEER_SIZES) -> dict[str, Any]:
    device = StubDevice()
    return compare(
        device,
        Budget(device, 1e9),
        seed=1,
        sizes=sizes,
        make_ours=lambda preset, sizes: plain_engine(preset, max(sizes.batch_sizes)),
        make_peer=make_peer,
    )


def test_pairs_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    peer = StubPeer(10.0)
    report = compare_with(lambda config, pair: peer)
    assert report["failed"] == 0 and report["missing"] == {}
    assert [one["pair"] for one in report["pairs"]] == ["dense", "4t4i"]
    dense, experts = report["pairs"]
    assert [set(case["ratios"]) for case in dense["cases"]] == [{"text"}, {"text"}]
    assert [set(case["ratios"]) for case in experts["cases"]] == [{"text"}, {"text", "mixed"}]
    for case in (*dense["cases"], *experts["cases"]):
        rates = case["decode_tokens_per_s"]
        assert rates["stub"]["median"] == 10
        for kind, found in case["ratios"].items():
            assert found["stub"] == pytest.approx(rates[kind]["median"] / 10)
    assert len(peer.asked) == 4 * 3  # cases, and rounds with the warm-up
    assert all(num_new == 4 for _, num_new in peer.asked)
    assert {len(prompt) for prompts, _ in peer.asked for prompt in prompts} == {5}
    assert peer.asked[0][0] != peer.asked[1][0]  # new prompts in each round
    json.dumps(report)
    assert "momaserve, mixed" in capsys.readouterr().out


def test_a_peer_that_fails_is_missing_and_ours_goes_on() -> None:
    report = compare_with(lambda config, pair: StubPeer(math.nan))
    assert report["missing"]["dense, batch 1, stub"] == "RuntimeError: out of memory"
    assert report["failed"] == 0
    assert report["pairs"][0]["cases"][0]["ratios"] == {"text": {}}


def test_pairs_and_cases_without_time_are_left_out() -> None:
    device = StubDevice()
    report = compare(
        device,
        Budget(device, 0.0015),  # a look at the clock is left
        seed=1,
        sizes=PEER_SIZES,
        make_ours=lambda preset, sizes: plain_engine(preset, 2),
        make_peer=lambda config, pair: StubPeer(1.0),
    )
    assert report["left_out"] == ["dense, batch 1", "dense, batch 2", "4t4i"]


def test_a_peer_that_cannot_be_loaded_is_missing() -> None:
    def absent(*_: object) -> StubPeer:
        raise ModuleNotFoundError("No module named 'transformers'")

    report = compare_with(absent)
    assert report["missing"]["4t4i"] == "ModuleNotFoundError: No module named 'transformers'"
    assert report["pairs"][1]["peer"] is None


def test_our_own_failure_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise RuntimeError("no")

    monkeypatch.setattr(peers.Ours, "run", fail)
    report = compare_with(lambda config, pair: StubPeer(1.0))
    assert report["failed"] == 5  # a kind of rows in each of three cases, two in the last


def test_each_round_begins_with_another() -> None:
    order: list[str] = []

    def turn(name: str) -> Callable[[int], float]:
        def run(number: int) -> float:
            order.append(f"{name}{number}")
            return 1.0

        return run

    rates, _ = peers.rounds({"a": turn("a"), "b": turn("b")}, PEER_SIZES)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert rates == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_the_nearest_shape_has_whole_vectors() -> None:
    config = nearest(preset_config("moma-1.4b-4t4i"))
    assert (config["intermediate_size"], config["num_local_experts"]) == (5464, 8)
    assert nearest(tiny("moma-90m-dense"))["model_type"] == "llama"


# --- the command ---------------------------------------------------------------------------


def run_command(
    tmp_path: Path, part: str, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict[str, Any]]:
    args = command.parser().parse_args([part, "--seed", "5", "--out", str(tmp_path)])
    command.check_arguments(args)

    def runner(name: str) -> Any:
        def run(device: Any, budget: Budget, seed: int, keep: Any) -> dict[str, Any]:
            assert seed == 5 and not budget.is_spent
            keep({"half": True})
            if isinstance(found.get(name), Exception):
                raise found[name]
            return dict(found.get(name, {"failed": 0}))

        return run

    status = command.run(args, StubDevice(), {name: runner(name) for name in command.PARTS})
    line: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return status, line


def test_the_last_line_and_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = run_command(tmp_path, "all", {}, capsys)
    assert status == 0
    assert line["bench"] == "gpu"
    assert {"machine", "settings", "check", "time", "peers"} <= line.keys()
    settings = line["settings"]
    assert settings["device"] == {"name": "a stub"} and settings["seed"] == 5
    assert {"triton", "transformers"} <= settings["versions"].keys()
    assert settings["command"].startswith("benchmarks/gpu.sh")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-check.json", "gpu-peers.json", "gpu-time.json",
    ]  # fmt: skip
    stored = json.loads((tmp_path / "gpu-time.json").read_text())
    assert stored["time"]["failed"] == 0 and stored["settings"] == settings


@pytest.mark.parametrize(
    "found",
    [
        {"check": {"failed": 2}},
        {"time": {"failures": {"attention": "no"}}},
        {"check": RuntimeError("CUDA error: an illegal memory access\nmore")},
    ],
)
def test_a_failure_is_the_exit_status_and_the_others_run(
    tmp_path: Path, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    status, line = run_command(tmp_path, "all", found, capsys)
    assert status == 1
    assert line["peers"]["failed"] == 0
    if isinstance(found.get("check"), Exception):
        reason = "RuntimeError: CUDA error: an illegal memory access"
        assert line["check"]["failures"] == {"check": reason}
        assert line["check"]["half"] is True  # what was there before


def test_one_part_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, line = run_command(tmp_path, "peers", {}, capsys)
    assert "peers" in line and "check" not in line
    assert [path.name for path in tmp_path.iterdir()] == ["gpu-peers.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "-1"], "--seed must be from 0 to 2147483647, got -1"),
        (["time", "--only", "norms"], "--only 'norms' is for check, not for time"),
        (["--limit", "0"], "--limit must be above 0 seconds, got 0"),
        (["--limit", "nan"], "--limit must be above 0 seconds, got nan"),
        (["--out", "/dev/null/results"], "--out /dev/null/results cannot be made"),
    ],
)
def test_arguments_that_cannot_work(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command.check_arguments(command.parser().parse_args(words))


def test_a_seed_comes_from_the_clock(tmp_path: Path) -> None:
    args = command.parser().parse_args(["--out", str(tmp_path)])
    command.check_arguments(args)
    assert args.part == "all" and 0 <= args.seed < 1 << 31


@no_gpu
def test_without_a_gpu_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no CUDA device"):
        CudaDevice()
    done = subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), "check"],
        env={"PYTHON": sys.executable, "OUT": str(tmp_path / "out"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu.sh: there is no CUDA device: torch ")
    assert not (tmp_path / "out").exists()


ABSENT = (
    "pydantic", "fastapi", "starlette", "uvicorn", "numba", "prometheus_client", "hypothesis",
    "tqdm", "transformers", "matplotlib",
)  # fmt: skip
IMPORTS = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None
from importlib import import_module
for name in ("__main__", "checks", "timing", "peers", "startup", "first_token"):
    import_module(f"momaserve_bench.gpu.{{name}}")
"""


def test_it_needs_nothing_of_the_server_or_of_other_backends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env={"PYTHONPATH": ":".join(str(ROOT / part) for part in (".", "server", "benchmarks"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
