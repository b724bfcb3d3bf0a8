"""`momaserve bench growth`: what it measures, prints and refuses, not how long it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve.request import TokenSequence
from momaserve_bench.growth import checked_held, checked_lengths
from momaserve_bench.growth_measure import GrowthBench
from momaserve_server.cli import main
from tests.engine.driver import make_engine

BLOCK_BYTES = 2 * 2 * 4 * 8 * 4 * 4
"""K and V of 2 layers with 4 heads of 8 in float32, of 4 tokens."""


def bench(engine: Engine) -> GrowthBench:
    return GrowthBench(engine, num_iters=2, seed=0)


def test_memory_of_blocks_is_counted_exactly(small_engine: Engine) -> None:
    """20 tokens; then 20 more, while the first request takes one step further."""
    blocks, process, base = bench(small_engine).memory([20, 40])
    assert [(p.x, p.y) for p in blocks.points] == [
        (20.0, 5.0 * BLOCK_BYTES),
        (41.0, 11.0 * BLOCK_BYTES),
    ]
    assert [p.details["num_requests"] for p in blocks.points] == [1, 2]
    assert [p.x for p in process.points] == [20.0, 41.0]
    assert all(p.y > 1 << 20 for p in process.points)
    assert base["kv_bytes_per_token"] == BLOCK_BYTES / 4
    cache = small_engine.scheduler.kv_cache
    assert base["kv_bytes_of_all_blocks"] == cache.num_blocks * BLOCK_BYTES
    assert not small_engine.has_work
    assert cache.usage == 0


def test_long_holds_are_made_of_several_requests(small_engine: Engine) -> None:
    """A model of 256 tokens: 128 in a prompt at most."""
    blocks, _, _ = bench(small_engine).memory([100, 400])
    assert [p.details["num_requests"] for p in blocks.points] == [1, 4]
    assert blocks.points[1].x >= 400
    assert blocks.points[1].y >= 400 / 4 * BLOCK_BYTES


def test_requests_that_cannot_be_held(small_checkpoint: Path) -> None:
    few = make_engine(small_checkpoint, max_num_requests=2)
    bench(few).check_held([100, 228])
    with pytest.raises(ConfigError, match="--held-tokens 229 takes 3 requests, and at most 2"):
        bench(few).check_held([100, 229])
    # 128 + 4 tokens for whoever comes first, as many for each that stays.
    small = make_engine(small_checkpoint, kv_cache_bytes=70 * BLOCK_BYTES)
    bench(small).check_held([128])
    with pytest.raises(ConfigError, match="--held-tokens 129 needs about 68 KV blocks.* 67"):
        tight = make_engine(small_checkpoint, kv_cache_bytes=67 * BLOCK_BYTES)
        bench(tight).check_held([129])


def test_default_holds_go_as_far_as_there_is_room(small_checkpoint: Path) -> None:
    engine = make_engine(small_checkpoint, max_num_requests=9)
    assert checked_held(bench(engine), None) == [256, 512, 1024]
    assert checked_held(bench(engine), [40, 20, 40]) == [20, 40]
    with pytest.raises(ConfigError, match="--held-tokens 2048 takes 16 requests"):
        checked_held(bench(engine), [2048])
    single = make_engine(small_checkpoint, max_num_requests=1)
    with pytest.raises(ConfigError, match="--held-tokens 256 takes 2 requests"):
        checked_held(bench(single), None)


def test_points_of_one_request(small_engine: Engine) -> None:
    curve = bench(small_engine).first_tokens([8, 16])
    assert [p.x for p in curve.points] == [8.0, 16.0]
    assert all(len(p.details["ttfts_ms"]) == 2 for p in curve.points)
    assert all(
        min(p.details["ttfts_ms"]) <= p.y <= max(p.details["ttfts_ms"]) for p in curve.points
    )
    curve = bench(small_engine).decoding([8, 16], 4)
    # Three tokens are decoded behind the first one: they see 9, 10 and 11 tokens.
    assert [p.x for p in curve.points] == [10.0, 18.0]
    assert [p.details["context"] for p in curve.points] == [8, 16]
    assert not small_engine.has_work


def test_no_prompt_is_spared(small_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    cache = small_engine.scheduler.kv_cache
    take_hits = cache.take_hits

    def counted(sequence: TokenSequence) -> int:
        taken.append(take_hits(sequence))
        return taken[-1]

    monkeypatch.setattr(cache, "take_hits", counted)
    mine = bench(small_engine)
    mine.first_tokens([32])
    mine.decoding([32], 3)
    mine.throughput([1, 2], 32, 3)
    mine.memory([64])
    assert taken
    assert not any(taken)


def test_default_lengths_end_at_what_the_model_takes(small_engine: Engine) -> None:
    assert checked_lengths("--input-len", None, small_engine, 1) == [128, 255]
    assert checked_lengths("--context", None, small_engine, 128) == [128]
    assert checked_lengths("--context", None, small_engine, 200) == [56]
    assert checked_lengths("--input-len", [9, 3, 9, 255], small_engine, 1) == [3, 9, 255]


def test_the_command(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--concurrency", "2", "1", "--input-len", "8", "16", "--context", "8", "16"]
    words += ["--held-tokens", "20", "40", "--num-iters", "1", "--prompt-len", "4"]
    words += ["--output-len", "3", "--block-size", "4", "--backend", "reference"]
    plot, saved = tmp_path / "growth.png", tmp_path / "growth.json"
    files = ["--plot", str(plot), "--save-result", str(saved)]
    assert main(["bench", "growth", str(small_checkpoint), *words, *files]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    report: dict[str, Any] = json.loads(last)
    assert saved.read_text() == last + "\n"
    assert report["bench"] == "growth"
    curves = report["curves"]
    xs = {
        "throughput": ("concurrency", [1, 2]),
        "first_token": ("input_len", [8, 16]),
        "decoding": ("mean_context", [9.5, 17.5]),
        "kv_memory": ("held_tokens", [20, 41]),
        "process_memory": ("held_tokens", [20, 41]),
    }
    assert {
        name: (curve["x"], [point[curve["x"]] for point in curve["points"]])
        for name, curve in curves.items()
    } == xs
    for curve in curves.values():
        assert all(point[curve["y"]] > 0 for point in curve["points"])
        assert curve["points"][0]["exponent"] is None
        assert isinstance(curve["points"][1]["exponent"], float)
    marked = {name: c for name, c in curves.items() if c["points"][1]["is_super_linear"]}
    assert report["super_linear"] == {name: [c["points"][1][c["x"]]] for name, c in marked.items()}
    for title in ("throughput", "first token", "decoding", "memory"):
        assert any(line.startswith(f"{title}: ") for line in table)
    assert sum("super-linear" in line and "explained" in line for line in table) == len(marked)
    assert report["nothing_held"]["resident_bytes"] > 0
    assert report["settings"]["backend"] == "reference"
    assert str(tmp_path) not in last
    with Image.open(plot) as picture:
        assert (picture.format, picture.size) == ("PNG", (1280, 960))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concurrency", "4", "0"], "--concurrency must be at least 1, got 0"),
        (["--input-len", "0"], "--input-len must be at least 1, got 0"),
        (["--context", "0"], "--context must be at least 1, got 0"),
        (["--held-tokens", "0"], "--held-tokens must be at least 1, got 0"),
        (["--prompt-len", "0"], "--prompt-len must be at least 1, got 0"),
        (["--output-len", "1"], "--output-len must be at least 2, for decoding begins after"),
        (["--num-iters", "0"], "--num-iters must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--input-len", "8", "256"], "--input-len 256 is more than 255: requests have at most"),
        (["--input-len", "64", "--max-model-len", "64"], "--input-len 64 is more than 63"),
        (["--context", "225"], "--context 225 is more than 224"),
        (["--prompt-len", "225"], "--prompt-len 225 is more than 224"),
        (["--output-len", "256"], "--output-len 256 leaves no room for a prompt"),
        (["--held-tokens", "99999"], "--held-tokens 99999 takes 782 requests, and at most 128"),
        (
            ["--concurrency", "2", "--kv-cache-bytes", "40960"],
            "--concurrency 2 needs 8 KV blocks, and there are 5",
        ),
        (["--max-num-requests", "2"], "max_num_requests 2 is less than the 128 requests"),
        (["--plot", "no/where.png"], "--plot no/where.png cannot be written"),
        (["--save-result", "no/where.json"], "--save-result no/where.json cannot be written"),
        (["--preset", "moma-90m-dense"], "--preset and --random-weights go together"),
    ],
)
def test_settings_that_cannot_work(
    small_checkpoint: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    source = [] if "--preset" in words else [str(small_checkpoint)]
    assert main(["bench", "growth", *source, "--backend", "reference", *words]) == 2
    assert message in capsys.readouterr().err
