"""`momaserve bench architectures`: what it runs, reports and refuses; engines are fakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from momaserve_bench import architectures
from momaserve_bench.peers.engine_process import EngineProcess
from momaserve_bench.peers.engines import Launch
from momaserve_bench.results_page import BEGIN, END
from momaserve_server.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
FAKE = Path(__file__).parent / "fake_architecture.py"
BANDWIDTH = 1000.0
QUICK = ["--size", "90m", "--threads", "1", "--pause", "0", "--rounds", "2", "--roof-gib", "0.001"]
QUICK += ["--input-len", "3", "--output-len", "4", "--prefill-len", "10"]


class Bench:
    """Runs the command with fake engines; `behaviours` are those of `fake_architecture.py`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, logs: Path) -> None:
        self.behaviours: dict[str, str] = {}
        self.started: list[str] = []
        self.available: int | None = None
        self._logs = logs
        monkeypatch.setattr(architectures, "launch_ours", self._launch)
        monkeypatch.setattr(architectures, "available_bytes", lambda: self.available)
        monkeypatch.setattr(architectures, "measure_read_bandwidth", lambda *_, **__: BANDWIDTH)

    def _launch(self, label: str, threads: int) -> Launch:
        self.started.append(label)
        behaviour = self.behaviours.get(label, "good")
        command = (sys.executable, str(FAKE), behaviour)
        return Launch(name=label, command=command, variables={"OMP_NUM_THREADS": str(threads)})

    def __call__(self, *words: str) -> int:
        return main(["bench", "architectures", *QUICK, "--logs", str(self._logs), *words])


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(monkeypatch, tmp_path / "logs")


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def rates(report: dict[str, Any], name: str, kind: str = "decode") -> dict[tuple[str, int], float]:
    return {
        (row["rows"], row["batch_size"]): row["tokens_per_s"]
        for row in report["results"]
        if (row["architecture"], row["kind"]) == (name, kind)
    }


# --- what it reports -----------------------------------------------------------------------


def test_everything_in_turn_with_ratios_against_dense(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--batch-sizes", "1", "4") == 0
    report = report_of(capsys)
    assert bench.started == ["dense", "moe_8x", "1t1i", "4t4i"]
    assert report["groups"] == [["dense", "moe_8x", "1t1i", "4t4i"]]
    assert report["missing"] == {}
    columns = [("text", 1), ("image", 1), ("text", 4), ("image", 4), ("mixed", 4)]
    seconds = {"dense": 1.0, "moe_8x": 2.0, "1t1i": 1.25, "4t4i": 4.0}
    for name, each in seconds.items():
        assert rates(report, name) == {
            (rows, size): pytest.approx(size / each) for rows, size in columns
        }
        assert rates(report, name, "prefill") == {("text", 1): pytest.approx(10 / each)}
    for row in report["results"]:
        assert row["ratio_to_dense"] == pytest.approx(1 / seconds[row["architecture"]])
        assert len(row["tokens_per_s_rounds"]) == 2
        assert (row["roof"] is None) == (row["kind"] == "prefill")

    last = next(r for r in report["results"] if (r["rows"], r["architecture"]) == ("mixed", "4t4i"))
    roof = last["roof"]
    assert roof["tokens_per_s"] == 4 * BANDWIDTH / 400
    assert roof["share"] == pytest.approx(1 / 10)
    assert roof["bytes_ratio_to_dense"] == 4
    assert roof["distinct_experts"] == {"all": 2.0}
    assert roof["expected_bytes_per_step"] > 1e8

    sizes = {one["architecture"]: one for one in report["architectures"]}
    assert sizes["4t4i"]["preset"] == "moma-90m-4t4i"
    assert sizes["4t4i"]["num_parameters"] == 209_740_288
    assert sizes["4t4i"]["ratios_to_dense"]["resident_bytes"] == 5
    assert sizes["4t4i"]["peak_resident_bytes"] == 10_000
    assert 2.2 < sizes["moe_8x"]["ratios_to_dense"]["weight_bytes"] < 2.4
    assert sizes["1t1i"]["ratios_to_dense"]["text_flops_per_token"] == 1
    assert sizes["dense"]["settings"] == {"ran": True}


def test_a_job_has_room_for_what_is_asked(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    ask = EngineProcess.ask

    def listening(process: Any, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        return ask(process, request)

    monkeypatch.setattr(EngineProcess, "ask", listening)
    words = ["--architectures", "dense", "--modality", "mixed", "--input-len", "700"]
    assert bench(*words, "--batch-sizes", "2", "--temperature", "0.5") == 0
    job = asked[0]["load"]
    assert job["model"] == "moma-90m-dense"
    assert (job["dtype"], job["threads"], job["temperature"]) == ("bfloat16", 1, 0.5)
    assert (job["max_batch_size"], job["max_num_step_tokens"], job["image_tokens"]) == (2, 1400, 4)
    assert job["kv_cache_bytes"] >= 2 * 706 * 2 * 8 * 512 * 2
    runs = [request["run"] for request in asked if "run" in request]
    assert [run["pictures"] for run in runs] == [[False, True]] * 3 + [[False]] * 3
    touched = [request["touched"] for request in asked if "touched" in request]
    assert touched == [runs[2]]  # the last timed round again
    assert runs[1]["prompts"] != runs[2]["prompts"]


def test_dense_takes_turns_with_one_other_where_memory_is_short(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.available = 3 * 10**9
    assert bench("--batch-sizes", "1", "--modality", "text") == 0
    assert bench.started == ["dense", "moe_8x", "dense", "1t1i", "dense", "4t4i"]
    report = report_of(capsys)
    assert report["groups"] == [["dense", "moe_8x"], ["dense", "1t1i"], ["dense", "4t4i"]]
    assert [one["architecture"] for one in report["architectures"]] == [
        "dense",
        "moe_8x",
        "1t1i",
        "4t4i",
    ]
    decode = [row for row in report["results"] if row["kind"] == "decode"]
    assert [len(row["tokens_per_s_rounds"]) for row in decode] == [6, 2, 2, 2]
    assert [row["ratio_to_dense"] for row in decode] == [1, 0.5, 0.8, 0.25]


def test_what_has_no_room_is_refused_before_anything_starts(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.available = 22 * 10**8
    assert bench() == 2
    error = capsys.readouterr().err
    assert "no room for moe_8x (1.3 GB), 4t4i (1.4 GB) beside dense (1.0 GB): 2.2 GB" in error
    assert bench.started == []
    two = ["--architectures", "dense", "1t1i"]
    assert bench(*two, "--roof-gib", "0.5") == 2  # the buffer needs room too
    assert bench(*two, "--dtype", "float32") == 2
    assert bench.started == []
    assert bench(*two) == 0


@pytest.mark.parametrize("behaviour", ["load", "run", "touched", "memory"])
def test_one_that_dies_is_named_and_the_others_go_on(
    bench: Bench, capsys: pytest.CaptureFixture[str], behaviour: str
) -> None:
    bench.behaviours["4t4i"] = behaviour
    assert bench("--batch-sizes", "1", "--modality", "text", "image") == 1
    output = capsys.readouterr().out
    report = json.loads(output.splitlines()[-1])
    reason = "4t4i died (exit status 3): out of luck"
    assert report["missing"] == {"4t4i": reason}
    assert f"not measured: 4t4i: {reason}" in output
    assert [one["architecture"] for one in report["architectures"]] == ["dense", "moe_8x", "1t1i"]
    assert rates(report, "moe_8x") == {("text", 1): 0.5, ("image", 1): 0.5}
    assert bool(rates(report, "4t4i")) == (behaviour == "memory")


def test_without_dense_there_are_no_ratios(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bench.behaviours["dense"] = "run"
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}{END}", encoding="utf-8")
    words = ["--batch-sizes", "1", "--modality", "text", "--page", str(page)]
    assert bench(*words, "--architectures", "dense", "1t1i") == 1
    report = report_of(capsys)
    assert [row["ratio_to_dense"] for row in report["results"]] == [None, None]
    assert report["architectures"][0]["ratios_to_dense"]["weight_bytes"] is None
    assert "Not measured: dense: dense died" in page.read_text(encoding="utf-8")


# --- files ---------------------------------------------------------------------------------


def test_the_page_gets_results_and_the_picture(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page, plot, saved = (tmp_path / name for name in ("page.md", "bars.png", "result.json"))
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    files = ["--page", str(page), "--plot", str(plot), "--save-result", str(saved)]
    assert bench("--batch-sizes", "1", "2", *files) == 0
    report = report_of(capsys)
    assert json.loads(saved.read_text(encoding="utf-8")) == report
    assert str(tmp_path) not in json.dumps(report["settings"])
    assert "machine" in report and report["bench"] == "architectures"
    text, old = page.read_text(encoding="utf-8"), PAGE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[0] == old.partition(BEGIN)[0]
    assert text.partition(END)[2] == old.partition(END)[2]
    results = text.partition(BEGIN)[2]
    assert "No result is committed" not in results
    assert results.count("## Results") == text.count(BEGIN) == text.count(END) == 1
    assert (
        "* `4t4i` decodes at 0.25 to 0.25 times and computes prompts at 0.25 times the tokens/s of "
        "dense; its weights take 2.32 times and its process 5.00 times the memory." in results
    )
    assert (
        "| mixed | 2 | moe_8x | 1.0 | 1.0–1.0 | 0.50 | 0.50–0.50 | 0 | 3.00 | all 2.00 | 15% |"
        in results
    )
    assert "![Tokens per second and memory by architecture](architectures.png)" in results
    for picture in (plot, tmp_path / "architectures.png"):
        with Image.open(picture) as image:
            assert image.size == (1920, 960)

    again = page.read_text(encoding="utf-8")
    assert bench("--batch-sizes", "1", "2", *files) == 0
    assert page.read_text(encoding="utf-8") == again


def test_bars_of_one_panel_less(bench: Bench, tmp_path: Path) -> None:
    plot = tmp_path / "bars.png"
    words = ["--batch-sizes", "2", "--modality", "text", "--prefill-len", "0"]
    assert bench(*words, "--plot", str(plot)) == 0
    with Image.open(plot) as image:  # decode, memory and the legend
        assert image.size == (1920, 480)


def test_a_page_without_marks_is_refused_before_anything_starts(
    bench: Bench, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text("words", encoding="utf-8")
    assert bench("--page", str(page)) == 1
    assert "must hold" in capsys.readouterr().err
    assert bench.started == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--architectures", "4t4i"], "--architectures must have dense"),
        (["--batch-sizes", "4", "3"], "--batch-sizes must be 1 or even"),
        (["--batch-sizes", "0"], "--batch-sizes must be at least 1, got 0"),
        (["--batch-sizes", "1", "--modality", "mixed"], "must be at least 2 for mixed batches"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--output-len", "1"], "--output-len must be at least 2, got 1"),
        (["--input-len", "4091"], "together must be at most 4094, got 4091 + 4"),
        (["--prefill-len", "4096"], "--prefill-len must be at most 4095, got 4096"),
        (["--threads", "100000"], "--threads must be at most"),
        (["--temperature", "-1"], "temperature must be between 0 and 100"),
        (["--roof-gib", "0.0001"], "--roof-gib must be at least 0.0010, got 0.0001"),
        (["--roof-gib", "nan"], "--roof-gib must be at least 0.0010, got nan"),
        (["--roof-gib", "inf"], "--roof-gib must be at least 0.0010, got inf"),
        (["--plot", "/nowhere/bars.png"], "--plot /nowhere/bars.png cannot be written"),
        (["--save-result", "/nowhere/r.json"], "--save-result: there is no folder /nowhere"),
    ],
)
def test_settings_that_cannot_work(
    bench: Bench, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert bench(*words) == 2
    assert message in capsys.readouterr().err
    assert bench.started == []


def test_odd_batches_do_where_nothing_is_mixed(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--batch-sizes", "3", "3", "--modality", "image", "--architectures", "dense"]
    assert bench(*words, "--prefill-len", "0") == 0
    assert rates(report_of(capsys), "dense") == {("image", 3): 3.0}
