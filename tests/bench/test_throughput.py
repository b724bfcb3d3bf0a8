"""`momaserve bench throughput`: what it makes and prints, not how long it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from momaserve.demo import CHECKPOINT
from momaserve.engine import Engine
from momaserve.errors import PromptError
from momaserve.outputs import TokenOutput
from momaserve.tokens.processor import Processor
from momaserve_bench.offline import OfflineRun, params_of, prompt_of, run_offline
from momaserve_bench.throughput import one_of_each_kind, summary
from momaserve_bench.workload import Kind, ModelShape, WorkItem, WorkloadSpec
from momaserve_server.cli import main
from tests.engine.driver import make_engine


def small_mix(engine: Engine, count: int = 8) -> list[WorkItem]:
    spec = WorkloadSpec(
        num_prompts=count,
        input_len=8,
        output_len=5,
        image_output_fraction=0.25,
        image_input_fraction=0.25,
    )
    return spec.make(ModelShape.from_engine(engine))


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_answers_have_the_length_asked_for(small_engine: Engine, concurrency: int) -> None:
    items = small_mix(small_engine)
    run = run_offline(small_engine, items, concurrency=concurrency, salt="s")
    # Two pictures of 4 codes and their end marks; six answers of 5 words.
    assert (run.num_requests, run.images, run.image_tokens) == (8, 2, 8)
    assert run.text_tokens == 2 + 6 * 5
    assert run.prompt_tokens == 4 * 8 + 2 * 9 + 2 * (8 + 6)
    assert run.elapsed_s > 0
    assert not small_engine.has_work


def test_only_so_many_run_at_a_time(small_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    step, seen = small_engine.step, set()

    def counted() -> list[TokenOutput]:
        seen.add(small_engine.scheduler.num_running + small_engine.scheduler.num_waiting)
        return step()

    monkeypatch.setattr(small_engine, "step", counted)
    run_offline(small_engine, small_mix(small_engine), concurrency=2, salt="s")
    assert max(seen) == 2


def test_a_short_queue_is_waited_for(small_checkpoint: Path) -> None:
    engine = make_engine(small_checkpoint, max_queued_requests=1)
    run = run_offline(engine, small_mix(engine), concurrency=5, salt="s")
    assert run.text_tokens == 32


def test_runs_share_prefixes_only_under_one_salt(small_engine: Engine) -> None:
    items = small_mix(small_engine)

    def cached(salt: str) -> int:
        return run_offline(small_engine, items, concurrency=8, salt=salt).cached_tokens

    assert cached("a") == 0
    assert cached("b") == 0
    assert cached("b") > 0


def test_a_request_that_is_refused_leaves_nothing_behind(small_engine: Engine) -> None:
    good = WorkItem(index=0, kind=Kind.TEXT, max_tokens=5, seed=0, token_ids=(30, 31))
    bad = WorkItem(index=1, kind=Kind.TEXT, max_tokens=5, seed=0, token_ids=(30, 99))
    with pytest.raises(PromptError, match="position 1"):
        run_offline(small_engine, [good, bad], concurrency=2, salt="s")
    assert not small_engine.scheduler.has_work
    assert small_engine.scheduler.kv_cache.usage == 0


def test_words_and_pixels_become_prompts() -> None:
    engine = Engine.load(CHECKPOINT)
    spec = WorkloadSpec(
        num_prompts=6,
        input_len=4,
        output_len=3,
        image_output_fraction=0.34,
        image_input_fraction=0.34,
        shared_prefix_fraction=1.0,
    )
    items = spec.make(ModelShape.from_engine(engine))
    processor: Processor = engine.processor
    assert engine.model_config.image is not None
    per_image = engine.model_config.image.tokens_per_image
    for item in items:
        ids = prompt_of(processor, item).token_ids
        num_codes = sum(i in processor.spec.image_ids for i in ids)
        assert num_codes == (per_image if item.kind is Kind.IMAGE_INPUT else 0)
    run = run_offline(engine, items, concurrency=6, salt="s")
    assert (run.images, run.image_tokens) == (2, 2 * per_image)
    assert run.text_tokens == 4 * 3 + 2 * 2  # begin and end marks
    assert run.cached_tokens > 0
    words = next(item for item in items if item.kind is Kind.IMAGE_OUTPUT)
    assert params_of(words, "s").max_tokens == per_image + 2


def test_medians_over_runs() -> None:
    runs = [
        OfflineRun(
            elapsed_s=s, num_requests=4, prompt_tokens=60, text_tokens=30, image_tokens=10, images=1
        )
        for s in (5.0, 1.0, 2.0)
    ]
    found = summary(runs)
    assert found["elapsed_time"] == 2.0
    assert found["elapsed_times"] == [5.0, 1.0, 2.0]
    assert (found["requests_per_second"], found["tokens_per_second"]) == (2.0, 50.0)
    assert (found["output_throughput"], found["text_output_throughput"]) == (20.0, 15.0)
    assert (found["image_output_throughput"], found["images_per_s"]) == (5.0, 0.5)
    assert (found["total_num_tokens"], found["total_input_tokens"]) == (100, 60)


def test_warm_up_has_one_of_each_kind(small_engine: Engine) -> None:
    items = small_mix(small_engine, 40)
    first = one_of_each_kind(items)
    assert {item.kind for item in first} == {Kind.TEXT, Kind.IMAGE_INPUT, Kind.IMAGE_OUTPUT}
    assert [item.index for item in first] == sorted(item.index for item in first)
    assert all(min(i.index for i in items if i.kind is f.kind) == f.index for f in first)


def test_the_command(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--num-prompts", "8", "--input-len", "8", "--output-len", "5", "--num-iters", "3"]
    words += ["--image-output-fraction", "0.25", "--concurrency", "1", "4"]
    plot = tmp_path / "throughput.png"
    command = ["bench", "throughput", str(small_checkpoint), *words, "--plot", str(plot)]
    assert main(command) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert any("images/s" in line for line in table)
    report = json.loads(last)
    assert report["bench"] == "throughput"
    assert [r["concurrency"] for r in report["results"]] == [1, 4]
    for r in report["results"]:
        assert len(r["elapsed_times"]) == 3
        assert sorted(r["elapsed_times"])[1] == r["elapsed_time"]
        assert (r["num_requests"], r["images"], r["total_output_tokens"]) == (8, 2, 40)
        assert r["requests_per_second"] == pytest.approx(8 / r["elapsed_time"])
    assert report["requests_per_second"] == report["results"][0]["requests_per_second"]
    assert report["settings"]["image_output_fraction"] == 0.25
    assert str(tmp_path) not in last
    with Image.open(plot) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concurrency", "4", "0"], "--concurrency must be at least 1, got 0"),
        (["--num-iters", "0"], "--num-iters must be at least 1, got 0"),
        (["--image-output-fraction", "1.2"], "--image-output-fraction must be between 0 and 1"),
        (["--image-tokens", "9"], "--image-tokens 9 cannot change the pictures of 4t4i"),
        (["--input-len", "250"], "more than the model's 256"),
        (["--max-num-requests", "2"], "max_num_requests 2 is less than the 32 requests"),
        (
            ["--input-len", "4", "--output-len", "4", "--plot", "no/where.png"],
            "--plot no/where.png cannot be written",
        ),
    ],
)
def test_settings_that_cannot_work(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    command = ["bench", "throughput", str(small_checkpoint), "--num-prompts", "2", *words]
    assert main(command) == 2
    assert message in capsys.readouterr().err
