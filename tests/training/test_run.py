"""A run's directory: state, refusal of other configurations, atomic files, schedules, log."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from momaserve.errors import DataError
from momaserve.training.run import (
    Run,
    cosine,
    logged_seconds,
    read_log,
    save_tensors,
    trapezoid,
    write_atomically,
)

CONFIG = {"seed": 1, "rate": 0.1}


def make_module(seed: int = 0) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def work(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


# --- state ---------------------------------------------------------------------------------


def test_a_state_brings_back_step_weights_and_moments(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", CONFIG, num_steps=5)
    module, optimizer = make_module()
    seen = []
    for step in run.steps():
        seen.append(step)
        work(module, optimizer)
        if step == 2:
            run.save({"net": module}, optimizer)
            break
    assert seen == [0, 1, 2]

    again = Run(tmp_path / "run", CONFIG, num_steps=5)
    other, other_optimizer = make_module(seed=9)
    again.resume({"net": other}, other_optimizer)
    assert again.step == 3
    work(module, optimizer)
    work(other, other_optimizer)
    assert torch.equal(module.weight, other.weight)
    assert torch.equal(module.bias, other.bias)
    assert list(again.steps()) == [3, 4]
    assert list(again.steps()) == []


def test_an_empty_directory_starts_at_the_beginning(tmp_path: Path) -> None:
    run = Run(tmp_path / "a" / "run", CONFIG, num_steps=2)
    module, optimizer = make_module()
    before = module.weight.clone()
    run.resume({"net": module}, optimizer)
    assert (run.step, list(run.steps())) == (0, [0, 1])
    assert torch.equal(module.weight, before)


def test_a_step_that_is_broken_off_is_not_counted(tmp_path: Path) -> None:
    run = Run(tmp_path, CONFIG, num_steps=3)
    with pytest.raises(KeyboardInterrupt):
        for step in run.steps():
            if step == 1:
                raise KeyboardInterrupt
    assert run.step == 1


@pytest.mark.parametrize("other", [{"seed": 2, "rate": 0.1}, {"seed": 1}, {**CONFIG, "x": 0}])
def test_another_configuration_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    Run(tmp_path, CONFIG, num_steps=3)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(DataError, match="holds a run with another configuration"):
        Run(tmp_path, other, num_steps=3)
    assert (tmp_path / "run.json").read_bytes() == before
    Run(tmp_path, CONFIG, num_steps=3)


def test_a_broken_state_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path, CONFIG, num_steps=3)
    run.state_path.write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"state\.safetensors cannot be read"):
        run.resume({}, make_module()[1])


# --- atomic files --------------------------------------------------------------------------


def test_files_are_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, tensors = tmp_path / "a.txt", tmp_path / "a.safetensors"
    write_atomically(text, "old")
    save_tensors({"x": torch.zeros(2)}, tensors, {})

    def power_cut(*_: Any) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", power_cut)
        with pytest.raises(OSError, match="power cut"):
            write_atomically(text, "new")
        with pytest.raises(OSError, match="power cut"):
            save_tensors({"x": torch.ones(2)}, tensors, {})
    assert text.read_text() == "old"
    assert load_file(tensors)["x"].tolist() == [0, 0]
    write_atomically(text, "new ✓")
    save_tensors({"x": torch.ones(2)}, tensors, {})
    assert text.read_text(encoding="utf-8") == "new ✓"
    assert load_file(tensors)["x"].tolist() == [1, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "a.txt"]


def test_tensors_are_readable_for_other_users_and_may_be_views(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    base = torch.arange(6.0, requires_grad=True).view(2, 3)
    save_tensors({"x": base.t()}, path, {"format": "pt"})
    assert path.stat().st_mode & 0o777 == 0o644
    assert load_file(path)["x"].tolist() == [[0, 3], [1, 4], [2, 5]]


# --- schedules -----------------------------------------------------------------------------


def test_trapezoid() -> None:
    values = [trapezoid(i, 100, warmup=10, decay_from=0.6, floor=0.1) for i in range(101)]
    assert values[0] == 0.1
    assert values[9:60] == [1.0] * 51
    assert values[60] == 1.0
    assert values[80] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)
    assert values[:10] == sorted(values[:10])
    assert values[60:] == sorted(values[60:], reverse=True)
    assert trapezoid(9, 10, warmup=0, decay_from=1.0, floor=0.0) == 1.0


def test_cosine() -> None:
    values = [cosine(i, 110, warmup=10, floor=0.02) for i in range(111)]
    assert values[0] == 0.1
    assert values[9:11] == [1.0, 1.0]
    assert values[60] == pytest.approx(0.51)
    assert values[110] == pytest.approx(0.02)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert cosine(0, 1, warmup=1, floor=0.5) == 1.0


# --- log -----------------------------------------------------------------------------------


def test_the_log_is_one_record_per_line(tmp_path: Path) -> None:
    run = Run(tmp_path, CONFIG, num_steps=2)
    for step in run.steps():
        run.log({"loss": 1.0 / (step + 3)})
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert [record["loss"] for record in records] == [0.333333, 0.25]
    assert all(record["elapsed_s"] >= 0 for record in records)


def test_logged_seconds_add_up_over_resumed_processes(tmp_path: Path) -> None:
    elapsed = [1.5, 4.0, 0.5, 2.0, 3.0]  # the second process began after 4 seconds
    lines = [json.dumps({"step": i, "elapsed_s": value}) for i, value in enumerate(elapsed)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert logged_seconds(tmp_path) == 7.0


def test_a_run_too_short_for_a_log_took_no_logged_time(tmp_path: Path) -> None:
    Run(tmp_path, CONFIG, num_steps=1)
    assert logged_seconds(tmp_path) == 0.0


def test_a_log_is_cut_behind_its_last_whole_line(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"step": i, "elapsed_s": 1.0}) + "\n" for i in (1, 2))
    path = tmp_path / "log.jsonl"
    path.write_text(lines + '{"step": 3, "elap')
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]
    Run(tmp_path, CONFIG, num_steps=3).resume({}, make_module()[1])
    assert path.read_text() == lines
    path.write_text('{"st')
    Run(tmp_path, CONFIG, num_steps=3).resume({}, make_module()[1])
    assert path.read_text() == ""
    assert logged_seconds(tmp_path) == 0.0


def test_of_steps_done_twice_the_later_counts(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    steps = [(1, "a"), (2, "b"), (2, "c"), (3, "d"), (4, "e"), (2, "f"), (2, "g"), (5, "h")]
    lines = [json.dumps({"step": step, name: 0, "x": name}) for step, name in steps]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    found: list[Any] = [(record["step"], record["x"]) for record in read_log(tmp_path)]
    assert found == [(1, "a"), (2, "g"), (5, "h")]


# --- what a newer version finds ------------------------------------------------------------


def test_settings_that_a_run_did_not_know_have_their_defaults(tmp_path: Path) -> None:
    old = {"model": {"size": 3}, "training": {"seed": 1}}
    defaults = {"training": {"seed": 0, "noise": None, "every": 500}, "origin": None}
    Run(tmp_path, old, num_steps=3)
    new: dict[str, Any] = {
        "training": {"noise": None, "seed": 1, "every": 500},
        "origin": None,
    }
    Run(tmp_path, {"model": {"size": 3}, **new}, num_steps=3, defaults=defaults)
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["training"] == new["training"]
    for change in ({"noise": "gumbel"}, {"every": 100}, {"seed": 0}):
        other = {"model": {"size": 3}, **new, "training": {**new["training"], **change}}
        with pytest.raises(DataError, match="another configuration"):
            Run(tmp_path, other, num_steps=3, defaults=defaults)
    with pytest.raises(DataError, match="another configuration"):
        Run(tmp_path, {"model": {"size": 4}, **new}, num_steps=3, defaults=defaults)


def test_counters_are_part_of_the_state(tmp_path: Path) -> None:
    module, optimizer = make_module()
    run = Run(tmp_path, CONFIG, num_steps=5)
    assert run.counters == {}
    run.counters["flops"] = 3.0 + 2.0**60
    run.save({"net": module}, optimizer)
    again = Run(tmp_path, CONFIG, num_steps=5)
    again.resume({"net": module}, optimizer)
    assert again.counters == {"flops": 3.0 + 2.0**60}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_a_bar_or_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    shown = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.delenv("COLUMNS", raising=False)  # a narrow terminal cuts the bar
    run = Run(tmp_path, CONFIG, num_steps=2)
    for step in run.steps():
        run.log({"loss": 0.5} if step else {"grad_norm": 2.0})
    text = shown.getvalue()
    if is_terminal:
        assert "grad_norm=2 loss=0.5" in text  # what is known stays in sight
        assert "2/2" in text
        assert "step 1  " not in text
    else:
        first, second = text.splitlines()
        assert first.startswith("step 1  elapsed_s ")
        assert second.endswith("loss 0.5")
