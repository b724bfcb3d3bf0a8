"""`momaserve bench peers` from arguments to the last line; its programs hold no engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from momaserve.models.presets import preset_config
from momaserve_bench.peers import comparison
from momaserve_bench.peers.contest import Case
from momaserve_bench.peers.engines import Launch, launch, why_not
from momaserve_bench.peers.environments import RECIPES, STAMP, absence, python_of
from momaserve_server.cli import main

_FAKE = Path(__file__).parent / "fake_engine.py"


def make_environment(root: Path, peer: str) -> None:
    python = python_of(peer, root)
    python.parent.mkdir(parents=True)
    python.touch()
    (root / peer / STAMP).write_text(RECIPES[peer].digest + "\n", encoding="utf-8")


class Bench:
    """The command with fake programs behind it."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.root = root
        self.behaviour: dict[str, str] = {}
        self.written: list[Path] = []
        self._capsys = capsys
        monkeypatch.setattr(comparison, "launch", self._launch)
        monkeypatch.setattr(comparison, "write_checkpoint", lambda d, c, s: self.written.append(d))

    def _launch(self, name: str, threads: int, root: Path) -> Launch:
        behaviour = self.behaviour.get(name, "good")
        return Launch(name=name, command=(sys.executable, str(_FAKE), behaviour), variables={})

    def __call__(self, *words: str) -> tuple[int, list[str], dict[str, Any]]:
        quick = ["--pause", "0", "--rounds", "2", "--environments", str(self.root)]
        code = main(["bench", "peers", *quick, *words])
        *lines, last = self._capsys.readouterr().out.splitlines()
        return code, lines, json.loads(last)


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Bench:
    return Bench(tmp_path, monkeypatch, capsys)


def test_prints_tables_and_one_line_of_json(bench: Bench, tmp_path: Path) -> None:
    for peer in RECIPES:
        make_environment(tmp_path, peer)
    saved = tmp_path / "result.json"
    code, lines, report = bench("--batch-sizes", "1", "2", "--save-result", str(saved))
    assert code == 0
    assert report["bench"] == "peers"
    assert report["settings"]["rounds"] == 2
    assert report["settings"]["batch_sizes"] == [1, 2]
    assert "save_result" not in report["settings"]
    assert "decode tokens/s: " in report["definition"]
    assert json.loads(saved.read_text(encoding="utf-8")) == report
    assert [pair["pair"] for pair in report["pairs"]] == ["dense", "moe_8x", "4t4i"]
    assert [pair["peer_architecture"] for pair in report["pairs"]] == ["llama"] + ["mixtral"] * 2
    dense, moe, split = report["pairs"]
    assert dense["missing"] == {}
    for pair in (moe, split):
        assert pair["missing"] == {"llama_cpp": "llama_cpp is compared on dense models only"}
    assert dense["engines"].keys() == {"momaserve", "vllm", "transformers", "llama_cpp"}
    assert dense["engines"]["vllm"]["versions"] == {"fake": "1.0"}
    assert dense["engines"]["vllm"]["settings"] == {"ran": True}
    rows = [(row["kind"], row["batch_size"], row["engine"]) for row in dense["results"]]
    engines = ["momaserve", "vllm", "transformers", "llama_cpp"]
    cases = [("decode", 1), ("decode", 2), ("prefill", 1)]
    assert rows == [(kind, size, engine) for kind, size in cases for engine in engines]
    labels = [row["engine"] for row in split["results"] if row["batch_size"] == 2]
    assert labels == [
        "momaserve",
        "momaserve (image)",
        "momaserve (mixed)",
        "vllm",
        "transformers",
    ]
    assert any(line.startswith("dense: tokens/s") for line in lines)
    assert bench.written == [
        tmp_path / "models" / name
        for name in ("llama-436208640-seed0", *["mixtral-1845347328-seed0"] * 2)
    ]


def test_rates_and_ratios(bench: Bench, tmp_path: Path) -> None:
    make_environment(tmp_path, "vllm")
    make_environment(tmp_path, "transformers")
    _, _, report = bench("--pairs", "dense", "--batch-sizes", "2", "--peers", "vllm")
    ours, theirs, ours_first, theirs_first = report["pairs"][0]["results"]
    # Fake times: a token every half second in two rows, the first after one second.
    assert ours["tokens_per_s"] == theirs["tokens_per_s"] == 4.0
    assert ours["tokens_per_s_rounds"] == [4.0, 4.0]
    assert ours["median_ttft_ms"] == 1000.0
    assert ours_first["tokens_per_s"] == 1024.0
    assert ours["ratios"] == {"vllm": 1.0}
    assert (ours["best_peer"], ours["ratio_to_best"]) == ("vllm", 1.0)
    assert "ratios" not in theirs and "ratios" not in theirs_first
    assert theirs["first_tokens_agree"] == 1.0


def test_absent_environments_are_named(bench: Bench, tmp_path: Path) -> None:
    make_environment(tmp_path, "vllm")
    (tmp_path / "vllm" / STAMP).write_text("an older recipe", encoding="utf-8")
    code, lines, report = bench("--pairs", "dense", "--prefill-len", "0")
    assert code == 0
    missing = report["pairs"][0]["missing"]
    assert missing.keys() == {"vllm", "transformers", "llama_cpp"}
    assert missing["vllm"].endswith("is out of date; `make peers` renews it")
    assert missing["llama_cpp"].startswith("no environment in ")
    assert any("not measured: transformers: no environment" in line for line in lines)
    assert [row["engine"] for row in report["pairs"][0]["results"]] == ["momaserve"] * 3
    assert all("ratios" not in row for row in report["pairs"][0]["results"])
    assert bench.written == []


@pytest.mark.parametrize("behaviour", ["dies", "error at load", "one short", "garbage"])
def test_a_peer_that_fails_is_named_and_the_others_go_on(
    bench: Bench, tmp_path: Path, behaviour: str
) -> None:
    for peer in ("vllm", "transformers"):
        make_environment(tmp_path, peer)
    bench.behaviour["vllm"] = behaviour
    code, lines, report = bench("--pairs", "dense", "--batch-sizes", "1")
    pair = report["pairs"][0]
    assert code == 0
    said = {
        "dies": "vllm died (exit status 3): something broke here",
        "error at load": "vllm: MemoryError: no room",
        "one short": "vllm made 63 tokens with 63 times in row 0, 64 were asked for",
        "garbage": "vllm answered b'Loading weights: 100%', which is no JSON",
    }[behaviour]
    assert pair["missing"]["vllm"].startswith(said)
    assert any(line.startswith(f"peers: dense: {said}") for line in lines)
    labels = {row["engine"] for row in pair["results"]}
    assert labels == {"momaserve", "transformers"}
    assert pair["results"][0]["ratios"] == {"transformers": 1.0}


def test_a_failure_of_ours_is_exit_status_1(bench: Bench, tmp_path: Path) -> None:
    make_environment(tmp_path, "vllm")
    bench.behaviour["momaserve"] = "dies"
    code, _, report = bench("--pairs", "dense", "--peers", "vllm")
    assert code == 1
    assert {row["engine"] for row in report["pairs"][0]["results"]} == {"vllm"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--output-len", "1"], "--output-len must be at least 2, got 1"),
        (["--input-len", "0"], "--input-len must be at least 1, got 0"),
        (["--prefill-len", "-1"], "--prefill-len must be at least 0, got -1"),
        (["--prefill-len", "4096"], "--prefill-len must be at most 4095, got 4096"),
        (["--batch-sizes", "8", "0"], "--batch-sizes must be at least 1, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", "100000"], "got 100000"),
        (["--pause", "-1"], "--pause must be at least 0 seconds, got -1.0"),
        (["--pause", "nan"], "--pause must be at least 0 seconds, got nan"),
        (["--save-result", "no/such/file.json"], "--save-result: there is no folder no/such"),
        (["--timeout", "0"], "--timeout must be more than 0 seconds, got 0.0"),
        (["--input-len", "4000", "--pairs", "dense", "--output-len", "97"], "4000 + 97"),
        (["--output-len", "1025"], "--output-len must be at most 1024 for 4t4i"),
        (["--input-len", "3071"], "--input-len must be at most 3070 for 4t4i"),
    ],
)
def test_bad_values_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "peers", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_environment(tmp_path, "vllm")
    (tmp_path / "models").write_text("a file", encoding="utf-8")
    words = ["--environments", str(tmp_path), "--pairs", "dense", "--prefill-len", "0"]
    assert main(["bench", "peers", *words]) == 2
    assert "llama-436208640-seed0 cannot be written: " in capsys.readouterr().err


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "peers", "--peers", "nobody"])
    assert stopped.value.code == 2
    assert "nobody" in capsys.readouterr().err


def test_an_environment_without_stamp_is_unfinished(tmp_path: Path) -> None:
    assert str(absence("vllm", tmp_path)).startswith("no environment")
    make_environment(tmp_path, "vllm")
    assert absence("vllm", tmp_path) is None
    (tmp_path / "vllm" / STAMP).unlink()
    assert str(absence("vllm", tmp_path)).startswith("no environment")
    assert why_not("vllm", True, tmp_path) is not None


def test_peers_run_in_their_own_environments(tmp_path: Path) -> None:
    ours, theirs = launch("momaserve", 2, tmp_path), launch("transformers", 2, tmp_path)
    assert ours.command[0] == sys.executable
    assert theirs.command[0] == str(tmp_path / "transformers" / "bin" / "python")
    assert ours.command[1] == theirs.command[1]
    assert Path(ours.command[1]).is_file()
    assert ours.variables == theirs.variables == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}


def test_vllm_gets_the_openmp_of_its_environment(tmp_path: Path) -> None:
    assert "LD_PRELOAD" not in launch("vllm", 1, tmp_path).variables
    library = tmp_path / "vllm" / "lib" / "libiomp5.so"
    library.parent.mkdir(parents=True)
    library.touch()
    variables = launch("vllm", 1, tmp_path).variables
    assert variables["LD_PRELOAD"] == str(library)
    assert variables["KMP_AFFINITY"].startswith("granularity=fine,explicit,proclist=[")


def test_cache_memory_is_for_the_largest_case_and_a_whole_context() -> None:
    config = preset_config("moma-435m-dense")
    case = Case(kind="decode", batch_size=32, input_len=32, output_len=64)
    tokens = 32 * 2 * 128 + 4096
    per_token = 2 * 24 * 16 * 64
    assert comparison.kv_cache_bytes(config, [case], "bfloat16") == tokens * per_token * 2
    assert comparison.kv_cache_bytes(config, [case], "float32") == tokens * per_token * 4
