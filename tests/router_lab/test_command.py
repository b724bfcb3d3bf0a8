"""`momaserve router-report` from a user's data to the page, on a tiny depth-routed checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from momaserve.router_lab import command, options, plots, source, store
from momaserve.router_lab.options import DEFAULT_PARTS, PARTS
from momaserve.router_lab.plots import style
from momaserve_server.cli import main
from tests.training.user_data import write_captions, write_recipe, write_texts

DEPTH = """
[model.depth_routing]
layers = [1]
capacity = 0.5
aux_hidden_size = 8
"""
QUICK = (
    *("--quick", "--batches", "1", "--bootstrap", "20", "--fit-steps", "3"),
    *("--threads", "1", "--device", "cpu"),
)


def command_line(*words: object) -> int:
    return main([str(word) for word in words])


def no_plots(report: object, out: Path) -> dict[str, Path]:
    return {}


def files_of(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Place:
    """A checkpoint trained for a few steps, its data and its recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_captions(folder / "data", 16)
        write_texts(self.data, 24)
        self.recipe = write_recipe(folder / "r.toml", has_pictures=True)
        self.recipe.write_text(self.recipe.read_text() + DEPTH)
        self.checkpoint = folder / "mine"
        source = ("--recipe", self.recipe, "--data", self.data)
        self.run("train-image-tokenizer", *source, "--out", folder / "codes")
        pictures = ("--image-tokenizer", folder / "codes")
        self.run("train", *source, *pictures, "--out", self.checkpoint)
        self.run("fit-routers", self.checkpoint, *source)

    def run(self, *words: object) -> None:
        assert command_line(*words) == 0

    def report(self, out: Path, *words: object) -> dict[str, Any]:
        source = ("--recipe", self.recipe, "--data", self.data, "--out", out)
        self.run("router-report", self.checkpoint, *source, *QUICK, *words)
        found: dict[str, Any] = json.loads((out / "report.json").read_text())
        return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("router-report"))


@pytest.fixture(scope="module")
def whole(place: Place) -> tuple[Path, dict[str, Any]]:
    """An undisturbed run of all parts, and a checkpoint that it has not touched."""
    before = files_of(place.checkpoint)
    out = place.folder / "whole"
    report = place.report(out, "--parts", *PARTS, "--baseline", place.checkpoint)
    assert files_of(place.checkpoint) == before
    return out, report


def test_the_report_has_what_the_page_documents(whole: tuple[Path, dict[str, Any]]) -> None:
    _, report = whole
    keys = "format checkpoint data settings machine findings parts"
    assert list(report) == keys.split()
    assert list(report["parts"]) == list(PARTS)
    assert report["checkpoint"]["depth_routing"] == {"layers": [1], "capacity": [0.5]}
    assert report["settings"]["seed"] == 0
    assert report["machine"]["torch"]
    assert report["machine"]["device"] == "cpu"
    policies = report["parts"]["policies"]["splits"]
    assert list(policies) == ["train", "held_out"]
    found = policies["train"]
    assert list(found["loss"]) == [
        "expert_choice",
        "expert_choice_prompt",
        "causal",
        "calibrated",
        "threshold",
        "random",
        "all",
    ]
    assert found["loss"]["expert_choice"]["all"]["delta"]["value"] == 0
    assert found["agreement"]["in_pass"]["expert_choice"]["depth"]["f1"]["value"] == 1
    assert found["use"]["all"]["depth"]["experts_per_token"] == 1
    assert {row["kind"] for row in found["routers"]} == {"text", "image", "depth"}
    assert len(found["layers"]["at_expert_choice"]) == 3 * 5
    assert len(found["layers"]["in_pass"]) == 7 * 5
    for row in found["layers"]["in_pass"]:
        total = sum(row["histogram"])  # 0: its layer took no token
        assert total == 0 or total == pytest.approx(1, abs=1e-4)
        if row["policy"] == "expert_choice":
            assert (row["mass_missed"], row["mass_added"]) == (0, 0)
        if row["policy"] == "all":
            assert row["mass_missed"] == 0
            assert row["without_expert"] == 0
    assert 1 <= len(report["parts"]["policies"]["pictures"]) <= 4
    assert "tasks are scored" in report["parts"]["generation"]["skipped"]


def test_noise_reaches_experts_and_depth(whole: tuple[Path, dict[str, Any]]) -> None:
    noise = whole[1]["parts"]["noise"]
    curves = {(c["base"], c["part"], c["kind"]): c for c in noise["curves"]}
    assert len(curves) == 10
    for curve in curves.values():
        points = {point["sigma"]: point for point in curve["points"]}
        assert points[0.0]["flipped"] == 0
        assert points[0.0]["loss"]["all"]["delta"]["value"] == 0
        if curve["kind"] == "uniform":
            assert points[0.2]["flipped"] == pytest.approx(0.2, abs=0.01)
        # The baseline is the model itself: from the first noise that hurts on, it wins.
        if curve["base"] == "expert_choice":
            assert curve["loses_to_baseline"]["all"]["value"] == 0
    assert 0 <= noise["floor"]["causal"]["experts"] < 0.1
    assert 0 <= noise["floor"]["causal"]["depth"] < 0.1


def test_sweeps_pass_through_what_is_served(whole: tuple[Path, dict[str, Any]]) -> None:
    parts = whole[1]["parts"]
    served = parts["policies"]["splits"]["train"]["loss"]
    for part in ("experts", "depth"):
        sweeps = {s["family"]: s for s in parts["thresholds"]["sweeps"] if s["part"] == part}
        assert len(sweeps) == 5
        for family, setting, policy in (
            ("expert_choice", 1.0, "expert_choice"),
            ("aux_global", 0.5, "causal"),
            ("calibrated_offset", 0.0, "calibrated"),
        ):
            (point,) = [p for p in sweeps[family]["points"] if p["setting"] == setting]
            wanted = served[policy]["all"]["nll"]["value"]
            assert point["loss"]["all"]["nll"]["value"] == pytest.approx(wanted, rel=1e-5)
        used = [p["experts_per_token"] for p in sweeps["expert_choice"]["points"]]
        kind = "depth" if part == "depth" else "text"
        assert [each[kind] for each in used] == sorted(each[kind] for each in used)


def test_every_shift_is_there_or_said_to_be_left_out(whole: tuple[Path, dict[str, Any]]) -> None:
    shift = whole[1]["parts"]["shift"]
    wanted = {"gaussian noise", "jpeg", "crop", "colour", "typos", "shuffled words"}
    wanted |= {"modality order", "sequence length", "batch composition"}
    assert wanted <= shift["shifts"].keys()
    assert ("german names" in shift["shifts"]) != ("german names" in shift["skipped"])
    for found in shift["shifts"].values():
        for point in found["points"]:
            assert point["loss"]["causal"].keys() == {"text", "image", "all"}
            assert point["agreement"]["causal"].keys() >= {"text", "depth"}


def test_the_page_needs_nothing_else(whole: tuple[Path, dict[str, Any]]) -> None:
    out, _ = whole
    page = (out / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"(?:src|href|action|data|poster|srcset)\s*=\s*[\"']?([^\"'\s>]*)", page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    outside = page.replace("data:image/png;base64,", "")
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe",
        re.sub(r"[A-Za-z0-9+/=]{200,}", "", outside),
    )
    assert "prefers-color-scheme: dark" in page
    assert page.count("<table>") == page.count("</table>") > 20
    assert page.count("<figure>") == len(list(out.glob("*.png"))) == len(plots.PLOTS)
    for finding in whole[1]["findings"]:
        assert escape(finding["question"]) in page
    for path in out.glob("*.png"):
        picture = Image.open(io.BytesIO(path.read_bytes()))
        assert min(picture.size) > 300, path


def test_a_run_that_was_cut_off_ends_as_an_undisturbed_one(
    place: Place,
    whole: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two parts of another process are there, one half and one whole."""
    out = place.folder / "cut"
    (out / "parts").mkdir(parents=True)
    for name in ("shift", "thresholds", "generation", "better-routers"):
        shutil.copy(whole[0] / "parts" / f"{name}.json", out / "parts")
    (out / "parts" / "noise.json").write_text('{"hash": "half a fi')
    (out / "parts" / "policies.json.tmp").write_text("half")
    place.report(out, "--parts", *PARTS, "--baseline", place.checkpoint)
    ends = [files_of(folder) for folder in (out, whole[0])]
    for files in ends:  # the documents' cache, whose metadata has no order
        del files["data/run/documents.safetensors"]
    assert ends[0] == ends[1]
    assert "report.html" in ends[0]
    monkeypatch.setattr(command, "draw_all", no_plots)
    capsys.readouterr()
    report = place.report(out, "--parts", "policies", "--baseline", place.checkpoint)
    assert " passes" not in capsys.readouterr().err
    assert report == whole[1]  # parts that are there are kept, and not measured again


def test_another_seed_is_another_report(
    place: Place, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "draw_all", no_plots)
    report = place.report(place.folder / "seed", "--parts", "policies", "--seed", "1")
    assert list(report["parts"]) == ["policies"]
    first, other = (r["parts"]["policies"]["splits"]["train"] for r in (whole[1], report))
    nll = [r["loss"]["expert_choice"]["all"]["nll"]["value"] for r in (first, other)]
    assert nll[0] != nll[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU: none here")
def test_a_gpu_finds_the_same(
    place: Place, whole: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "draw_all", no_plots)
    more = ("--parts", *PARTS, "--baseline", place.checkpoint, "--device", "cuda")
    report = place.report(place.folder / "gpu", *more)
    assert report["machine"]["device"] == "cuda"
    for split, found in report["parts"]["policies"]["splits"].items():
        wanted = whole[1]["parts"]["policies"]["splits"][split]
        for policy in ("expert_choice", "causal", "calibrated"):
            nll = [each["loss"][policy]["all"]["nll"]["value"] for each in (found, wanted)]
            assert nll[0] == pytest.approx(nll[1], rel=0.01)


def test_parts_of_another_device_are_not_taken_over(
    place: Place, whole: tuple[Path, dict[str, Any]]
) -> None:
    words = ["router-report", place.checkpoint, "--data", place.data, "--recipe", place.recipe]
    words += ["--out", place.folder / "whole", *QUICK]
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    args = parser.parse_args([str(word) for word in words[1:]])
    settings = command.settings_of(args)
    data = source.open_source(
        args.data,
        args.recipe,
        place.checkpoint,
        args.out,
        num_batches=settings.batches,
        seed=settings.seed,
    )
    found = [
        command._dependencies(args, data, settings, torch.device(name)) for name in ("cpu", "cuda")
    ]
    assert all(found[0][name] != found[1][name] for name in PARTS)
    kept = store.Store(whole[0])
    assert kept.load("policies", found[0]["policies"]) is not None
    assert kept.load("policies", found[1]["policies"]) is None


def test_without_matplotlib_there_are_tables(
    place: Place,
    whole: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(style, "import_module", missing)
    out = place.folder / "bare"
    place.report(out, "--parts", "policies")
    assert "no plots: drawing needs matplotlib" in capsys.readouterr().err
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<figure>" not in page
    assert "<table>" in page


def test_a_checkpoint_of_words_whose_routers_were_never_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it cannot do is said; the rest is measured."""
    data, recipe = write_texts(tmp_path / "texts"), write_recipe(tmp_path / "r.toml")
    source = ("--recipe", recipe, "--data", data)
    assert command_line("train", *source, "--out", tmp_path / "mine") == 0
    parts = ("policies", "noise", "thresholds", "shift")
    out = ("--out", tmp_path / "out", *QUICK, "--parts", *parts)
    assert command_line("router-report", tmp_path / "mine", *source, *out) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["parts"]
    skipped = found["policies"]["skipped"]
    assert skipped.keys() == {"causal", "expert_choice_prompt", "calibrated"}
    assert "fit-routers" in skipped["causal"]
    assert found["policies"]["splits"]["train"]["loss"]["random"].keys() == {"text", "all"}
    assert {curve["base"] for curve in found["noise"]["curves"]} == {"expert_choice"}
    assert [s["family"] for s in found["thresholds"]["sweeps"]] == ["expert_choice"]
    assert found["shift"]["skipped"]["modality order"] == "there are no pictures"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "fit-routers" in page
    assert page.count("<figure>") == len(list((tmp_path / "out").glob("*.png"))) >= 4
    assert "Warning" not in capsys.readouterr().err

    recipe = write_recipe(tmp_path / "dense.toml", experts=1)
    source = ("--recipe", recipe, "--data", data)
    assert command_line("train", *source, "--out", tmp_path / "dense") == 0
    words = ("router-report", tmp_path / "dense", *source, "--out", tmp_path / "none")
    assert command_line(*words) == 1
    assert "has no routers to report on" in capsys.readouterr().err


def test_mistakes_get_one_line(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object, code: int = 2) -> str:
        capsys.readouterr()
        source = ("--out", place.folder / "no", "--data", place.data, "--recipe", place.recipe)
        listed = [str(word) for word in ("router-report", place.checkpoint, *source, *words)]
        assert main(listed) == code
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("momaserve router-report: error: ")
        return line

    assert "--batches must be at least 1, got 0" in refused("--batches", "0")
    assert "--bootstrap must be at least 20" in refused("--bootstrap", "1")
    if not torch.cuda.is_available():
        assert "sees no GPU" in refused("--device", "cuda")
    assert "--out must not be the checkpoint" in refused("--out", place.checkpoint)
    assert "which recipe 'demo' is not for" in refused("--recipe", "demo")
    assert "no data at" in refused("--data", place.folder / "nowhere", code=1)
    assert "does not exist" in refused("--baseline", place.folder / "nowhere", code=1)
    assert main(["router-report", str(place.folder / "x"), "--data", "demo", "--out", "y"]) == 1
    assert "is no checkpoint directory" in capsys.readouterr().err


def test_help_is_light_and_lists_the_parts() -> None:
    code = (
        "import sys\nfrom momaserve_server.cli import main\n"
        "try:\n    main(['router-report', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([n for n in ('torch', 'numpy', 'matplotlib') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(part in done.stdout for part in PARTS)
    assert PARTS[:-1] == DEFAULT_PARTS
