"""`momaserve bench latency`: what it counts and prints, not how long it takes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.request import Submission
from momaserve.sampling import OutputMode, SamplingParams
from momaserve.tokens.prompt import Prompt
from momaserve_bench import engine_setup
from momaserve_bench.batch_run import LoadCounter, run_batch
from momaserve_bench.engine_setup import load_engine, settings_of, with_image_tokens
from momaserve_server.cli import main
from momaserve_server.cli_options import GENERATE_OPTIONS, add_model_source, add_options
from tests.engine.driver import WORDS, make_engine

QUICK = ["--num-iters", "2", "--num-iters-warmup", "0", "--roof-gib", "0.001", "--input-len", "5"]
TEXT, IMAGE = Modality.TEXT, Modality.IMAGE


def submission(engine: Engine, name: str, mode: OutputMode, count: int) -> Submission:
    params = SamplingParams(mode=mode, max_tokens=count, ignore_eos=True, seed=1, cache_salt=name)
    return engine.make_submission(Prompt(tuple(WORDS)), params, name)


# --- a batch -------------------------------------------------------------------------------


def test_loads_of_a_mixed_batch(small_engine: Engine) -> None:
    """Prompts of 5; one row draws a picture of 4 codes, one says 4 words."""
    batch = [
        submission(small_engine, "words", OutputMode.TEXT, 4),
        submission(small_engine, "picture", OutputMode.IMAGE, 6),
    ]
    counter = LoadCounter(small_engine.model_config)
    times = run_batch(small_engine, batch, counter)
    assert (times.num_decode_steps, times.num_decode_tokens) == (3, 6)
    assert len(counter.loads) == 3
    for step, load in enumerate(counter.loads):
        assert load.num_tokens == {TEXT: 1, IMAGE: 1}
        # Words: prompt, begin_image and what was said so far; codes: those drawn so far.
        assert load.context_tokens == {TEXT: 5 + step + 1 + 5 + 1, IMAGE: step + 1}
        assert {(layer, group) for layer, group, _ in load.expert_tokens} == {
            (layer, group) for layer in (0, 1) for group in ("text", "image")
        }
        assert all(max(tokens) <= 1 for _, _, tokens in load.expert_tokens)
    assert 0 < times.prefill_s < times.latency_s
    assert not small_engine.has_work
    assert small_engine.listener is None


def test_rows_that_never_decode_together(small_checkpoint: Path) -> None:
    engine = make_engine(small_checkpoint, max_num_requests=1)
    batch = [submission(engine, name, OutputMode.TEXT, 4) for name in "ab"]
    with pytest.raises(ConfigError, match="a row of the batch of 2 ended before all of them"):
        run_batch(engine, batch)
    assert not engine.has_work


def test_prompts_in_chunks_are_no_decoding(small_checkpoint: Path) -> None:
    """Five tokens a step: the second row's prompt is computed while the first one decodes."""
    engine = make_engine(small_checkpoint, max_num_step_tokens=5)
    batch = [submission(engine, name, OutputMode.TEXT, 9) for name in "ab"]
    counter = LoadCounter(engine.model_config)
    times = run_batch(engine, batch, counter)
    assert times.num_decode_steps < 8  # the first row was ahead
    assert all(load.num_tokens == {TEXT: 2} for load in counter.loads)
    assert times.num_decode_tokens == 2 * times.num_decode_steps


# --- setting up ----------------------------------------------------------------------------


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_source(parser)
    add_options(parser, GENERATE_OPTIONS, {})
    return parser.parse_args(words)


def test_room_is_made_where_nobody_set_it(small_checkpoint: Path) -> None:
    engine = load_engine(parse(str(small_checkpoint)), num_requests=40)
    assert engine.config.scheduler.max_num_requests == 40
    engine = load_engine(parse(str(small_checkpoint)), num_requests=2)
    assert engine.config.scheduler.max_num_requests == 32
    with pytest.raises(ConfigError, match="max_num_requests 3 is less than the 4 requests"):
        load_engine(parse(str(small_checkpoint), "--max-num-requests", "3"), num_requests=4)


def test_room_that_a_file_sets(small_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("max-num-requests = 3\n")
    with pytest.raises(ConfigError, match="max_num_requests 3 is less than the 4 requests"):
        load_engine(parse(str(small_checkpoint), "--config", str(file)), num_requests=4)


def test_pictures_of_another_length(small_engine: Engine) -> None:
    config = with_image_tokens(small_engine.model_config, 7)
    assert config.image is not None
    assert (config.image.tokens_per_image, config.image.grid) == (7, (1, 7))
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="at least 1 code, got 0"):
        with_image_tokens(small_engine.model_config, 0)


def test_a_checkpoint_keeps_its_pictures(small_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="--image-tokens 7 cannot change the pictures of 4t4i"):
        load_engine(parse(str(small_checkpoint)), num_requests=1, image_tokens=7)


def test_settings_keep_secrets_and_places_to_themselves() -> None:
    args = argparse.Namespace(
        bench="serve", api_key="k", checkpoint=Path("/x"), seed=3, rate=[float("inf"), 2.0]
    )
    assert settings_of(args, "demo") == {"model": "demo", "seed": 3, "rate": ["inf", 2.0]}


# --- the command ---------------------------------------------------------------------------


def report_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["bench", "latency", *words]) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def test_reports_every_batch_beside_its_roof(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--modality", "text", "image", "mixed", "--batch-size", "2", "4", *QUICK]
    traces = tmp_path / "traces"
    report = report_of(capsys, str(small_checkpoint), *words, "--profile", str(traces))
    results = report["results"]
    assert [(r["modality"], r["batch_size"]) for r in results] == [
        (modality, size) for modality in ("text", "image", "mixed") for size in (2, 4)
    ]
    assert report["settings"]["output_len"] == 4  # the codes of a picture
    assert report["settings"]["dtype"] == "float32"
    assert {"commit", "threads"} <= report["machine"].keys()
    assert report["avg_latency"] == results[0]["avg_latency"]
    for r in results:
        assert len(r["latencies"]) == 2
        assert r["avg_latency"] == pytest.approx(sum(r["latencies"]) / 2)
        assert list(r["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
        assert min(r["latencies"]) <= r["percentiles"]["10"] <= r["percentiles"]["99"]
        assert r["num_decode_steps"] == 3
        roof = r["roof"]
        assert sum(roof["parts"].values()) == pytest.approx(roof["bytes_per_step"])
        seconds = roof["bytes_per_step"] / report["read_bandwidth_bytes_per_s"]
        assert roof["ms_per_token"] == pytest.approx(1e3 * seconds)
        assert roof["share"] == pytest.approx(roof["ms_per_token"] / r["ms_per_token"])
        assert roof["tokens_per_s"] == pytest.approx(r["batch_size"] / seconds)
    # Prompts of 5; rows see 7, 8 and 9 tokens with the mark of a picture, else 6, 7 and 8; K and V
    # of 2 layers with 4 heads of 8, in float32.
    token = 2 * 2 * 4 * 8 * 4
    kv = [r["roof"]["parts"]["kv"] for r in results]
    assert kv == [n * token for n in (2 * 7, 4 * 7, 2 * 8, 4 * 8, 7 + 8, 2 * (7 + 8))]
    experts = [set(r["roof"]["distinct_experts"]) for r in results[::2]]
    assert experts == [{"text"}, {"image"}, {"text", "image"}]
    assert sorted(path.name for path in traces.iterdir()) == sorted(
        f"latency-{r['modality']}-batch-{r['batch_size']}.json" for r in results
    )
    trace = json.loads((traces / "latency-text-batch-2.json").read_text())
    assert any("aten::" in str(event.get("name")) for event in trace["traceEvents"])


def test_the_same_seed_touches_the_same_bytes(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(small_checkpoint), "--output-len", "6", *QUICK, "--temperature", "1"]

    def touched(*more: str) -> Any:
        return report_of(capsys, *words, *more)["roof"]["parts"]["experts"]

    assert touched("--seed", "1") == touched("--seed", "1")
    assert touched("--seed", "1") != touched("--seed", "2")


def test_pictures_of_a_preset_are_as_long_as_asked(
    small_engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preset of the small shape, for the real ones take long to fill."""
    monkeypatch.setattr(engine_setup, "preset_config", lambda name: small_engine.model_config)
    preset = ["--preset", "moma-90m-4t4i", "--random-weights", "--modality", "image"]
    report = report_of(capsys, *preset, "--output-len", "9", "--batch-size", "1", *QUICK)
    assert (report["num_decode_steps"], report["settings"]["output_len"]) == (8, 9)
    assert report["settings"]["model"] == "moma-90m-4t4i"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input-len", "0"], "--input-len must be at least 1, got 0"),
        (["--output-len", "1"], "--output-len must be at least 2, for decoding begins after"),
        (["--num-iters", "0"], "--num-iters must be at least 1, got 0"),
        (["--num-iters-warmup", "-1"], "--num-iters-warmup must be at least 0, got -1"),
        (["--batch-size", "2", "0"], "--batch-size must be at least 1, got 0"),
        (["--modality", "mixed", "--batch-size", "3"], "--batch-size must be even, got 3"),
        (["--roof-gib", "0"], "--roof-gib must be above 0, got 0.0"),
        (["--roof-gib", "nan"], "--roof-gib must be above 0, got nan"),
        (["--roof-gib", "0.0001", "--output-len", "4"], "at least 1048576 bytes, got 107374"),
        (
            ["--modality", "image", "--output-len", "5"],
            "--output-len 5 does not go with pictures of 4t4i: they have 4 codes",
        ),
        (["--temperature", "-1"], "temperature must be between 0 and 100"),
        (["--preset", "moma-90m-dense"], "--preset and --random-weights go together"),
    ],
)
def test_settings_that_cannot_work(
    small_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    source = [] if "--preset" in words else [str(small_checkpoint)]
    roof = [] if "--roof-gib" in words else ["--roof-gib", "0.001"]
    assert main(["bench", "latency", *source, *roof, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_trace_that_cannot_be_written(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = [str(small_checkpoint), *QUICK, "--output-len", "3"]
    assert main(["bench", "latency", *words, "--profile", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
