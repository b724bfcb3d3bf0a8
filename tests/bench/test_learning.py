"""`momaserve bench learning`: arithmetic of curves, and a smoke run of a few steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from momaserve.errors import DataError
from momaserve_bench.learning_curves import (
    curves_of,
    flops_to_reach,
    mean,
    smoothed,
    speed_up,
)
from momaserve_bench.learning_report import write_page
from momaserve_bench.results_page import BEGIN, END
from momaserve_server.cli import main
from tests.training.user_data import write_captions, write_recipe

PAGE = Path(__file__).parent.parent.parent / "docs" / "learning.md"


# --- curves --------------------------------------------------------------------------------


def test_smoothing_averages_both_coordinates() -> None:
    curve = [(1.0, 8.0), (2.0, 6.0), (3.0, 1.0), (4.0, 5.0)]
    assert smoothed(curve, 1) == curve
    assert smoothed(curve, 2) == [(1.5, 7.0), (2.5, 3.5), (3.5, 3.0)]
    assert smoothed(curve, 4) == smoothed(curve, 99) == [(2.5, 5.0)]
    assert smoothed([], 3) == []


def test_a_straight_line_stays_itself() -> None:
    line = [(float(x), 100 - 3.0 * x) for x in range(20)]
    for flops, loss in smoothed(line, 7):
        assert loss == pytest.approx(100 - 3 * flops)


def test_reaching_a_loss_lies_between_points() -> None:
    curve = [(10.0, 4.0), (20.0, 3.0), (30.0, 3.5), (40.0, 1.5)]
    assert flops_to_reach(curve, 3.5) == 15.0
    assert flops_to_reach(curve, 3.25) == 31.25  # for good, after the rise
    assert flops_to_reach(curve, 2.5) == 35.0
    assert flops_to_reach(curve, 1.5) == 40.0
    assert flops_to_reach(curve, 5.0) == 10.0  # from the first point on
    assert flops_to_reach(curve, 1.4) is None
    assert flops_to_reach([], 1.0) is None


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("window", [1, 25])
def test_eta_of_a_model_that_learns_so_many_times_faster(factor: float, window: int) -> None:
    """loss(flops) of the sparse model is that of the dense one at `factor` times the FLOPs."""
    flops = [float(i) for i in range(1, 501)]
    dense = smoothed([(x, math.log(10 + 1000 / x)) for x in flops], window)
    sparse = smoothed([(x, math.log(10 + 1000 / (factor * x))) for x in flops], window)
    assert speed_up(dense, sparse) == pytest.approx(factor, rel=0.02)


def test_eta_over_itself_is_one_but_for_dips() -> None:
    falling = [(1.0, 3.0), (2.0, 2.5), (3.0, 2.0)]
    assert speed_up(falling, falling) == 1.0
    dipping = [(1.0, 3.0), (2.0, 1.0), (3.0, 2.5), (4.0, 2.0)]
    assert speed_up(dipping, dipping) == 1.0
    assert speed_up([(1.0, 3.0), (2.0, 1.0), (4.0, 2.0)], [(1.0, 3.0), (2.0, 1.0)]) == 4 / 1.5


def test_eta_of_a_model_that_never_arrives() -> None:
    assert speed_up([(1.0, 3.0), (2.0, 2.0)], [(1.0, 3.0), (2.0, 2.1)]) is None
    assert speed_up([], [(1.0, 2.0)]) is None
    assert speed_up([(1.0, 2.0)], []) is None


def test_a_mean_needs_every_value() -> None:
    assert mean([1.0, 3.0]) == 2.0
    assert mean([1.0, None]) is None
    assert mean([]) is None


def test_curves_come_out_of_a_log() -> None:
    records = [
        {"step": 1, "flops": 10.0, "text_nll": 3.0, "all_nll": 3.0},
        {"step": 2, "flops": 20.0, "text_nll": 2.0, "image_nll": 4.0, "all_nll": 3.5},
        {"step": 2, "flops": 20.0, "valid_text_nll": 5.0},
    ]
    assert curves_of(records) == {
        "text": [(10.0, 3.0), (20.0, 2.0)],
        "image": [(20.0, 4.0)],
        "all": [(10.0, 3.0), (20.0, 3.5)],
    }
    later = curves_of(records, "valid_", flops_before=100.0)
    assert later == {"text": [(120.0, 5.0)], "image": [], "all": []}


# --- the command ---------------------------------------------------------------------------


def test_a_few_steps_of_every_architecture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_captions(tmp_path / "data")
    recipe = write_recipe(tmp_path / "r.toml", has_pictures=True)
    source = ["--recipe", str(recipe), "--data", str(data)]
    codes, out, page = tmp_path / "codes", tmp_path / "out", tmp_path / "page.md"
    assert main(["train-image-tokenizer", *source, "--out", str(codes)]) == 0
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    words = [*source, "--image-tokenizer", str(codes), "--out", str(out), "--steps", "8"]
    words += ["--seeds", "0", "3", "--hidden-size", "24", "--num-layers", "1", "--num-rows", "1"]
    capsys.readouterr()
    assert main(["bench", "learning", *words, "--page", str(page)]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    names = ["dense", "1t1i", "moe_8x", "4t4i", "upcycled"]
    assert [(r["architecture"], r["seed"]) for r in report["runs"]] == [
        (name, seed) for seed in (0, 3) for name in names
    ]
    assert any("eta image" in line for line in table)
    assert report["settings"]["steps"] == 8
    assert str(tmp_path) not in json.dumps(report["settings"])
    assert all(eta >= 1 for eta in report["speed_up"]["dense"]["all"]["per_seed"])

    # The same FLOPs but for routers, on the same rows.
    flops = {run["architecture"]: run["flops"] for run in report["runs"] if run["seed"] == 0}
    assert flops["dense"] == flops["1t1i"]
    for name in ("moe_8x", "4t4i", "upcycled"):
        assert 1 < flops[name] / flops["dense"] < 1.1
    assert flops["1t1i"] < flops["upcycled"] < flops["4t4i"]
    parameters = {run["architecture"]: run["parameters"] for run in report["runs"]}
    assert parameters["upcycled"] == parameters["4t4i"] > parameters["1t1i"] > parameters["dense"]

    whole = json.loads((out / "learning.json").read_text())
    first = whole["runs"][0]
    assert [flops for flops, _ in first["curves"]["train"]["all"]][-1] == first["flops"]
    assert len(first["curves"]["train"]["all"]) == len(first["curves"]["validation"]["all"]) == 8
    upcycled = whole["runs"][4]["curves"]["train"]["all"]
    assert len(upcycled) == 8
    assert upcycled == sorted(upcycled)
    seeded = json.loads((out / "upcycled-seed0" / "run" / "run.json").read_text())
    assert seeded["skip_steps"] == 2
    with Image.open(out / "learning.png") as picture:
        assert picture.width == 1920

    text = page.read_text(encoding="utf-8")
    assert text.startswith(PAGE.read_text(encoding="utf-8").partition(BEGIN)[0])
    assert text.count(BEGIN) == text.count(END) == text.count("## Results") == 1
    assert (tmp_path / "learning.png").exists()

    # Everything is there: a second call trains nothing and reports the same.
    written = (out / "4t4i-seed3" / "model.safetensors").stat().st_mtime_ns
    assert main(["bench", "learning", *words, "--page", str(page)]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["runs"] == report["runs"]
    assert (out / "4t4i-seed3" / "model.safetensors").stat().st_mtime_ns == written
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "--steps must be at least 4, got 3"),
        (["--steps", "8", "--seeds", "1", "1"], "--seeds repeat"),
        (["--steps", "8", "--hidden-size", "33"], "must be a multiple of head_dim 32, got 33"),
    ],
)
def test_settings_that_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["bench", "learning", "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    with pytest.raises(DataError, match="cannot be read"):
        write_page(page, {}, tmp_path / "x.png")
    page.write_text(f"{END} {BEGIN}")
    with pytest.raises(DataError, match="must hold"):
        write_page(page, {}, tmp_path / "x.png")
