"""`momaserve bench serve` against real servers, and against one that refuses everything."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from momaserve.demo import CHECKPOINT
from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve.llm import LLM
from momaserve.models.config import ModelConfig
from momaserve_bench import target
from momaserve_bench.bodies import http_request
from momaserve_bench.http_cost import check_same_model, http_cost
from momaserve_bench.offline import params_of, prompt_of
from momaserve_bench.options import add_arguments
from momaserve_bench.target import Target, TargetError, own_server, target_of
from momaserve_bench.workload import Kind, ModelShape, WorkItem, WorkloadSpec
from momaserve_server.cli import main
from tests.bench.test_workload import CARD
from tests.engine.driver import make_engine

JSON = {"Content-Type": "application/json"}
CARD_OF_SMALL = {
    **CARD,
    "id": "small",
    "vocab_size": 64,
    "has_tokenizer": False,
    "image": {
        "tokens_per_image": 4,
        "first_token_id": 4,
        "num_codes": 16,
        "begin_token_id": 21,
        "end_token_id": 20,
        "size": None,
    },
    "expert_groups": [
        {"name": name, "modalities": [name], "num_experts": 4} for name in ("text", "image")
    ],
}


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["serve", *words])


@contextmanager
def refusing_server(num_not_ready: int = 0, key: str | None = None) -> Iterator[str]:
    """Ready after so many questions; has a model card, and no room for any request."""
    left = num_not_ready

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal left
            if self.path == "/ready":
                left -= 1
                self._say(503 if left >= 0 else 200, {})
            elif key is not None and self.headers["Authorization"] != f"Bearer {key}":
                self._say(401, {})
            else:
                self._say(200, {"data": [CARD_OF_SMALL]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._say(429, {"error": {"code": "queue_full", "message": "no room here"}})

        def _say(self, status: int, payload: dict[str, Any]) -> None:
            data = json.dumps(payload).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


# --- real servers --------------------------------------------------------------------------


def test_the_demo_on_a_server_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words and pixels, both ways, with probes, cancels, two rates, and the same offline."""
    saved, plot = tmp_path / "result.json", tmp_path / "serve.png"
    words = ["--num-prompts", "10", "--input-len", "6", "--output-len", "4"]
    words += ["--image-output-fraction", "0.3", "--image-input-fraction", "0.2"]
    words += ["--probe-fraction", "0.1", "--cancel-fraction", "0.22", "--max-concurrency", "4"]
    words += ["--request-rate", "inf", "50", "--goodput", "ttft:60000", "e2el:60000"]
    words += ["--offline-baseline", "--baseline-iters", "1", "--threads", "1"]
    words += ["--save-result", str(saved), "--plot", str(plot)]
    assert main(["bench", "serve", *words]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert any("HTTP costs" in line for line in table)
    report = json.loads(last)
    assert [r["request_rate"] for r in report["results"]] == ["inf", 50.0]
    for r in report["results"]:
        assert (r["completed"], r["failed"], r["cancelled"]) == (8, 0, 2)
        assert (r["probes"], r["failures"]) == (1, [])
        assert r["request_goodput"] == pytest.approx(7 / r["duration"])
        assert r["request_throughput"] == pytest.approx(8 / r["duration"])
        assert r["images_per_s"] == pytest.approx(r["images"] / r["duration"])
        for metric in ("ttft", "tpot", "itl", "e2el", "image_latency", "first_partial_image"):
            for stat in ("mean", "median", "std", "p50", "p99"):
                assert r[f"{stat}_{metric}_ms"] >= 0
        assert r["mean_first_partial_image_ms"] < r["mean_image_latency_ms"]
        assert r["mean_ttft_ms"] <= r["mean_scheduled_ttft_ms"]
    costs = report["http_cost"]
    assert {part: cost["num_requests"] for part, cost in costs.items()} == {
        "pictures": 3,
        "text_streams": 6,
    }
    for cost in costs.values():
        assert cost["cost_percent"] == pytest.approx(100 * (cost["http_s"] / cost["offline_s"] - 1))
    assert report["mean_ttft_ms"] == report["results"][0]["mean_ttft_ms"]
    assert report["settings"]["request_rate"] == ["inf", 50.0]
    whole = json.loads(saved.read_text())
    requests = whole["results"][0]["requests"]
    assert Counter(r["kind"] for r in requests) == Counter(
        {"text": 4, "image_output": 3, "image_input": 2, "probe": 1}
    )
    done = [r for r in requests if r["outcome"] == "completed"]
    assert sum(r["images"] for r in done) == whole["images"]
    image = ModelConfig.load(CHECKPOINT).image
    assert image is not None
    assert {r["output_tokens"] for r in done} == {4, image.tokens_per_image, 1}
    assert all(r["sent_s"] <= r["first_byte_s"] <= r["last_byte_s"] for r in done)
    with Image.open(plot) as picture:
        assert picture.format == "PNG"


@pytest.fixture(scope="module")
def small_server(small_checkpoint: Path) -> Iterator[str]:
    """Knows ids alone, pictures too."""
    with own_server(parse(str(small_checkpoint), "--block-size", "4")) as url:
        yield url


def test_a_server_that_runs_already(
    small_server: str, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--base-url", f"{small_server}/v1", "--num-prompts", "8", "--input-len", "6"]
    words += ["--output-len", "5", "--image-output-fraction", "0.25"]
    words += ["--image-input-fraction", "0.25", "--percentile-metrics", "ttft"]
    assert main(["bench", "serve", *words, "--metric-percentiles", "90"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["completed"], report["images"]) == (8, 2)
    assert report["total_output_tokens"] == 6 * 5 + 2 * 5
    assert report["image_output_throughput"] * report["duration"] == pytest.approx(8)
    assert report["mean_first_partial_image_ms"] is None  # ids show no pixels
    assert report["p90_ttft_ms"] > 0
    assert "p90_itl_ms" not in report and "p99_ttft_ms" not in report
    assert httpx.get(f"{small_server}/ready").status_code == 200  # it is not ours to stop


def test_both_sides_of_a_comparison_make_the_same_tokens(
    small_server: str, small_checkpoint: Path
) -> None:
    engine = make_engine(small_checkpoint)
    spec = WorkloadSpec(
        num_prompts=4,
        input_len=6,
        output_len=5,
        image_output_fraction=0.25,
        image_input_fraction=0.25,
    )
    for work in spec.make(ModelShape.from_engine(engine)):
        prompt = prompt_of(engine.processor, work)
        (offline,) = LLM(engine).generate(prompt, params_of(work, "s"))
        path, body = http_request(work, model="4t4i", salt="s", partial_images=0)
        answer = httpx.post(small_server + path, content=body, headers=JSON)
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        choices = [c for event in events[:-1] for c in json.loads(event)["choices"]]
        served = [token for choice in choices for token in choice["token_ids"]]
        assert served == offline.choices[0].token_ids
        assert len(served) == work.max_tokens


def test_costs_of_the_parts_that_there_are(small_server: str, small_checkpoint: Path) -> None:
    work = WorkItem(index=0, kind=Kind.IMAGE_OUTPUT, max_tokens=5, seed=1, token_ids=(30, 31, 21))
    engine = make_engine(small_checkpoint)
    with target_of(parse("--base-url", small_server)) as there:
        check_same_model(engine, there)
        costs = http_cost(there, engine, [work], concurrency=1, num_iters=2, salt="x")
    assert set(costs) == {"pictures"}
    assert costs["pictures"]["http_s"] > 0


def test_another_model_offline_is_no_comparison(small_server: str) -> None:
    engine = Engine.load(CHECKPOINT)
    with (
        target_of(parse("--base-url", small_server)) as there,
        pytest.raises(ConfigError, match="is not what http://.* serves as 4t4i"),
    ):
        check_same_model(engine, there)


def test_a_failed_request_ends_a_comparison(small_checkpoint: Path) -> None:
    work = WorkItem(index=0, kind=Kind.TEXT, max_tokens=5, seed=1, token_ids=(30,))
    with refusing_server() as url:
        there = Target(url=url, headers={}, model="small", card=CARD_OF_SMALL)
        with pytest.raises(TargetError, match="--offline-baseline: 429 queue_full: no room here"):
            http_cost(
                there, make_engine(small_checkpoint), [work], concurrency=1, num_iters=1, salt="x"
            )


# --- servers that do not serve -------------------------------------------------------------


def test_all_failed_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, saved = tmp_path / "none.png", tmp_path / "result.json"
    with refusing_server() as url:
        words = ["--base-url", url, "--num-prompts", "3", "--plot", str(plot)]
        assert main(["bench", "serve", *words, "--save-result", str(saved)]) == 1
    *table, last = capsys.readouterr().out.splitlines()
    assert "  3 failed with 429 queue_full: no room here" in table
    report = json.loads(last)
    assert (report["completed"], report["failed"]) == (0, 3)
    assert report["failures"] == [
        {"reason": "429 queue_full", "count": 3, "example": "no room here"}
    ]
    assert not plot.exists()
    assert len(json.loads(saved.read_text())["results"][0]["requests"]) == 3


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{target._free_port()}"
    assert main(["bench", "serve", "--base-url", url]) == 1
    assert f"error: {url} is not ready after 0 s: " in capsys.readouterr().err


def test_a_server_may_be_waited_for() -> None:
    with refusing_server(num_not_ready=2) as url:
        with pytest.raises(TargetError, match="it answers /ready with 503"):
            target.wait_until_ready(url, 0.0)
        target.wait_until_ready(url, 60.0)


def test_keys_are_sent_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MOMASERVE_API_KEY", raising=False)
    with refusing_server(key="secret") as url:
        assert main(["bench", "serve", "--base-url", url, "--num-prompts", "1"]) == 1
        assert "/v1/models answers with 401: give --api-key" in capsys.readouterr().err
        words = ["--base-url", url, "--num-prompts", "1", "--api-key", "secret"]
        assert main(["bench", "serve", *words]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out.splitlines()[-1])["failed"] == 1
    assert "secret" not in shown.out + shown.err


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(TargetError, match=r"ended with code 1 before it was ready: .*nowhere"),
        own_server(parse(str(tmp_path / "nowhere"))),
    ):
        pass


def test_a_server_of_its_own_ends_with_a_benchmark_that_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def killed(url: str, timeout_s: float, process: subprocess.Popen[bytes]) -> None:
        started.append(process)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(target, "wait_until_ready", killed)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), own_server(parse()):
        pass
    assert started[0].returncode is not None
    assert signal.getsignal(signal.SIGTERM) is before


# --- arguments -----------------------------------------------------------------------------


def test_settings_reach_a_server_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('block-size = 8\ndtype = "float32"\nno-prefix-caching = true\n')
    words = ["--config", str(file), "--dtype", "bfloat16", "--num-prompts", "900"]
    assert target.option_words(parse(*words)) == [
        *("--dtype", "bfloat16"),
        *("--block-size", "8"),
        "--no-prefix-caching",
        *("--max-queued-requests", "900"),
    ]
    assert "--max-queued-requests 3" in " ".join(
        target.option_words(parse("--max-queued-requests", "3"))
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--request-rate", "2", "-1"], "--request-rate must be above 0, or inf, got -1"),
        (["--burstiness", "0"], "--burstiness must be above 0, got 0"),
        (["--max-concurrency", "0"], "--max-concurrency must be at least 1, got 0"),
        (["--baseline-iters", "0"], "--baseline-iters must be at least 1, got 0"),
        (["--goodput", "speed:1"], "--goodput knows ttft"),
        (["--percentile-metrics", "speed"], "--percentile-metrics knows ttft"),
        (["--metric-percentiles", "101"], "--metric-percentiles must be numbers between 0 and 100"),
        (
            ["--image-output-fraction", "0.6", "--probe-fraction", "0.6"],
            "add up to more than 1: 1.2",
        ),
        (["--ready-check", "-1"], "--ready-check must be at least 0 s, got -1"),
        (["--base-url", "ftp://x"], "--base-url must be like http://127.0.0.1:8000"),
        (["--base-url", "http://x:y"], "--base-url 'http://x:y' is no URL"),
        (["--base-url", "http://x", "here"], "CHECKPOINT and --preset go with it only"),
        (["--base-url", "http://x", "--dtype", "float32"], "drop --dtype"),
        (["--base-url", "http://x", "--api-key", "ä"], "--api-key must be printable ASCII"),
        (["--preset", "moma-90m-dense"], "--preset and --random-weights go together"),
    ],
)
def test_arguments_that_cannot_work(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_the_model_cannot_do(capsys: pytest.CaptureFixture[str]) -> None:
    with refusing_server() as url:
        for words, message in (
            (["--model", "other"], "--model 'other' is not served at"),
            (["--input-len", "300"], "more than the model's 256"),
        ):
            assert main(["bench", "serve", "--base-url", url, *words]) == 2
            assert message in capsys.readouterr().err


def test_a_hidden_picture_cannot_be_cancelled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CARD_OF_SMALL, "has_tokenizer", True)
    monkeypatch.setitem(CARD_OF_SMALL, "image", {**CARD["image"], "first_token_id": 30})
    words = ["--image-output-fraction", "1", "--cancel-fraction", "1", "--partial-images", "0"]
    with refusing_server() as url:
        assert main(["bench", "serve", "--base-url", url, *words]) == 2
    assert "--partial-images 0 shows nothing of a picture" in capsys.readouterr().err
