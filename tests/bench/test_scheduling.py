"""`momaserve bench scheduling`: what it simulates and prints, not how long that takes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from momaserve.config import SchedulerConfig, Scheduling
from momaserve.core.cost_model import MachineRates
from momaserve.core.model_costs import model_costs
from momaserve.models.presets import preset_config
from momaserve.tokens.grammar import GrammarSpec
from momaserve_bench import scheduling_confirm
from momaserve_bench.engine_setup import with_image_tokens
from momaserve_bench.scheduling_point import Targets, choose_targets, measure, summarise
from momaserve_bench.scheduling_simulator import Machine, Outcome, Served, Simulation
from momaserve_bench.scheduling_trace import Arrival, make_trace
from momaserve_server.cli import main
from tests.models.factory import make_config

SIXTEEN = with_image_tokens(preset_config("moma-435m-4t4i"), 16)
SPEC = GrammarSpec.from_config(SIXTEEN)
COSTS = model_costs(SIXTEEN, 2)
CPU = MachineRates(bytes_per_s=23e9, flops_per_s=150e9, fixed_s=1e-3)


def trace(rate_per_s: float = math.inf, *, seed: int = 0, count: int = 160) -> list[Arrival]:
    return make_trace(SPEC, num_requests=count, prompt_tokens=16, rate_per_s=rate_per_s, seed=seed)


def serve(
    arrivals: list[Arrival],
    scheduling: Scheduling,
    *,
    slots: int = 8,
    machine: Machine | None = None,
    **settings: Any,
) -> Outcome:
    config = SchedulerConfig(
        max_num_requests=slots, max_queued_requests=1000, scheduling=scheduling, **settings
    )
    return Simulation(COSTS, SPEC, machine or Machine(rates=CPU), config, seed=1).run(arrivals)


# --- requests ---------------------------------------------------------------------------------


def test_half_of_the_requests_are_for_pictures() -> None:
    arrivals = trace(5.0)
    assert sum(a.draws for a in arrivals) == 80
    words = [a.num_text_tokens for a in arrivals if not a.draws]
    assert min(words) == 8
    assert max(words) == 24
    assert sum(words) == pytest.approx(80 * 16, rel=0.1)
    assert all(8 <= len(a.prompt_ids) <= 24 for a in arrivals)
    assert not any(token in SPEC.image_ids for a in arrivals for token in a.prompt_ids)


def test_another_rate_changes_nothing_but_times() -> None:
    slow, quick = trace(1.0), trace(2.0)
    assert [a.time_s for a in slow] == pytest.approx([2 * a.time_s for a in quick])
    assert [a.prompt_ids for a in slow] == [a.prompt_ids for a in quick]
    assert all(a.time_s == 0.0 for a in trace(math.inf))
    assert trace(1.0, seed=1) != slow


# --- simulation -------------------------------------------------------------------------------


def test_one_request_takes_what_its_steps_are_predicted_to_take() -> None:
    arrivals = [Arrival(name="r", time_s=2.0, prompt_ids=(9000,) * 8, num_text_tokens=3)]
    outcome = serve(arrivals, Scheduling.FCFS)
    (served,) = outcome.served
    assert (outcome.num_tokens, outcome.num_steps) == (3, 3)
    assert served.start_s == served.arrival_s == 2.0
    first, second, third = served.token_times_s
    assert first - 2.0 > second - first > 1e-3  # a prompt touches more experts than a token
    assert third == outcome.end_s
    assert outcome.median_error < 0.01


def test_a_picture_has_its_tokens_and_no_more() -> None:
    arrivals = [Arrival(name="r", time_s=0.0, prompt_ids=(9000,) * 8, num_text_tokens=0)]
    assert serve(arrivals, Scheduling.FCFS).num_tokens == 16


def test_a_run_replays_exactly() -> None:
    machine = Machine(rates=CPU, noise=0.1, belief=0.5)
    runs = [serve(trace(2.0), Scheduling.ROUTER_AWARE, machine=machine) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("belief", [0.3, 1.0, 3.0])
def test_a_wrong_bandwidth_is_learnt(belief: float) -> None:
    machine = Machine(rates=CPU, noise=0.05, belief=belief)
    outcome = serve(trace(), Scheduling.ROUTER_AWARE, machine=machine)
    assert outcome.median_error < 0.06


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("belief", [0.5, 1.0])
def test_a_backlog_is_served_faster(seed: int, belief: float) -> None:
    """Deterministic: the goal is a tenth more tokens per second where weights dominate."""
    machine = Machine(rates=CPU, noise=0.05, belief=belief)
    first, aware = (
        serve(trace(seed=seed), scheduling, machine=machine)
        for scheduling in (Scheduling.FCFS, Scheduling.ROUTER_AWARE)
    )
    assert first.num_tokens == aware.num_tokens
    assert aware.tokens_per_s >= 1.10 * first.tokens_per_s


def test_nobody_is_passed_more_often_than_is_promised() -> None:
    for limit in (0, 4, None):
        outcome = serve(trace(), Scheduling.ROUTER_AWARE, max_num_passes=limit)
        most = max(s.num_passes for s in outcome.served)
        assert most <= (32 if limit is None else limit)
        assert (most > 0) == (limit != 0)
    assert all(s.num_passes == 0 for s in serve(trace(), Scheduling.FCFS).served)


def test_a_light_load_is_served_in_order() -> None:
    runs = [serve(trace(0.3, count=40), scheduling) for scheduling in Scheduling]
    assert runs[0].served == runs[1].served


# --- numbers ----------------------------------------------------------------------------------


def test_a_summary_by_hand() -> None:
    served = (
        Served(arrival_s=0.0, token_times_s=[1.0, 2.0, 3.0], start_s=0.5),
        Served(arrival_s=1.0, token_times_s=[5.0], start_s=4.0, num_passes=2),
    )
    outcome = Outcome(served=served, end_s=5.0, num_tokens=4, num_steps=5, median_error=0.1)
    found = summarise(outcome, Targets(ttft_s=2.0, itl_s=1.0))
    assert found.tokens_per_s == 0.8
    assert found.mean_ttft_ms == 2500
    assert found.p50_itl_ms == 1000
    assert found.longest_wait_s == 3.0
    assert found.most_passes == 2
    assert found.request_goodput == 1 / 5  # the second came too late
    assert summarise(outcome, Targets(ttft_s=9.0, itl_s=0.9)).request_goodput == 1 / 5


def test_targets_follow_from_full_slots_unless_given() -> None:
    outcome = Outcome(served=(), end_s=10.0, num_tokens=0, num_steps=100, median_error=0.0)
    found = choose_targets(outcome, 64, None, None)
    assert (found.ttft_s, found.itl_s) == pytest.approx((6.4, 0.15))
    assert choose_targets(outcome, 64, 500.0, 20.0) == Targets(ttft_s=0.5, itl_s=0.02)


def test_loads_are_offered_over_what_first_come_can_serve() -> None:
    rates: list[float] = []

    def record(rate_per_s: float, seed: int) -> list[Arrival]:
        rates.append(rate_per_s)
        return trace(rate_per_s, seed=seed, count=16)

    def run(scheduling: Scheduling, arrivals: Any) -> Outcome:
        return serve(arrivals, scheduling, slots=2)

    capacity = run(Scheduling.FCFS, trace(count=16)).requests_per_s
    points = measure(run, record, lambda _: Targets(ttft_s=1, itl_s=1), loads=[0.5, 2.0], seeds=[0])
    assert rates == [math.inf, 0.5 * capacity, 2.0 * capacity]
    assert [point.load for point in points] == [0.5, 2.0]
    entry = points[1].to_dict()
    aware, first = points[1].router_aware[0], points[1].fcfs[0]
    assert entry["lowest_tokens_per_s_ratio"] == aware.tokens_per_s / first.tokens_per_s


# --- command ----------------------------------------------------------------------------------

SMALL = ["--sizes", "90m", "--machines", "cpu", "--slots", "2", "--seeds", "0", "1"]
SMALL += ["--num-requests", "12", "--image-tokens", "4", "--prompt-tokens", "4"]


def test_prints_a_table_and_one_line_of_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved, plotted = tmp_path / "result.json", tmp_path / "plot.png"
    words = ["--save-result", str(saved), "--plot", str(plotted)]
    assert main(["bench", "scheduling", *SMALL, *words]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert any("longest wait s" in line for line in table)
    report = json.loads(last)
    assert json.loads(saved.read_text()) == report
    assert plotted.read_bytes().startswith(b"\x89PNG")
    assert report["bench"] == "scheduling"
    assert report["settings"]["slots"] == [2]
    assert [(p["preset"], p["slots"], p["load"]) for p in report["points"]] == [
        ("moma-90m-4t4i", 2, 0.7),
        ("moma-90m-4t4i", 2, 1.5),
    ]
    for point in report["points"]:
        assert len(point["fcfs"]) == len(point["router_aware"]) == 2
        assert {"tokens_per_s", "p99_ttft_ms", "p50_itl_ms"} <= point["ratios"].keys()
        assert all(run["median_error"] < 0.5 for run in point["router_aware"])
    assert report["lowest_ratio"] > 0
    assert "confirmed" not in report


def test_the_real_engine_serves_the_same_requests(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model in the place of the preset: what counts is that all of it runs."""
    tiny = make_config(max_position_embeddings=64)
    assert tiny.image is not None
    monkeypatch.setattr(scheduling_confirm, "preset_config", lambda name: tiny)
    words = [*SMALL, "--confirm", "--max-num-passes", "1"]
    assert main(["bench", "scheduling", *words]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(p["slots"], p["load"]) for p in report["confirmed"]] == [(2, 0.7), (2, 1.5)]
    for point in report["confirmed"]:
        (first,), (aware,) = point["fcfs"], point["router_aware"]
        assert first["tokens_per_s"] > 0
        assert aware["tokens_per_s"] > 0
        assert first["most_passes"] == 0
        assert aware["most_passes"] <= 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--slots", "0", "--slots must be positive, got 0"),
        ("--loads", "-1", "--loads must be positive, got -1.0"),
        ("--image-tokens", "0", "--image-tokens must be positive, got 0"),
        ("--belief", "nan", "--belief must be positive, got nan"),
        ("--noise", "2", "--noise must be between 0 and 1, got 2.0"),
        ("--num-requests", "1", "--num-requests must be at least 2"),
        ("--max-num-passes", "-1", "max_num_passes must be at least 0, got -1"),
        ("--step-time-target-ms", "0", "step_time_target_ms must be a positive number"),
    ],
)
def test_values_out_of_range_are_refused(
    capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert main(["bench", "scheduling", *SMALL, option, value]) == 2
    assert message in capsys.readouterr().err
