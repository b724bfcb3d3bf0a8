"""Our own side of the comparison: the real engine behind the protocol, on a small checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

import momaserve.engine
from momaserve_bench import engine_setup
from momaserve_bench.peers.programs import run_momaserve
from momaserve_bench.peers.programs.run_momaserve import Engine
from momaserve_bench.peers.rates import decode_rate

_CODES = 4
"""Of a picture of the checkpoint."""


@pytest.fixture
def engine(small_checkpoint: Path) -> Engine:
    return Engine(
        {
            "model": str(small_checkpoint),
            "dtype": "float32",
            "threads": 1,
            "max_batch_size": 4,
            "kv_cache_bytes": 1 << 20,
        }
    )


_BEGIN, _WORD = 21, 22
_IMAGE_IDS = range(4, 20)


def test_words_are_as_many_as_asked_for_whatever_they_are(engine: Engine) -> None:
    tokens, times = engine.run([[_WORD, _WORD + 1], [_WORD + 2] * 2], 20, [False, False])
    assert [len(row) for row in tokens] == [len(row) for row in times] == [20, 20]
    assert not {token for row in tokens for token in row} & {*_IMAGE_IDS, 2}
    assert times[0] == sorted(times[0]) and times[0][0] > 0
    assert decode_rate(times) > 0


@pytest.mark.parametrize("num_new", [2, _CODES])
def test_rows_that_draw_make_codes_and_leave_nothing_behind(engine: Engine, num_new: int) -> None:
    tokens, times = engine.run([[_WORD, _BEGIN], [_WORD] * 2], num_new, [True, False])
    assert [len(row) for row in tokens] == [len(row) for row in times] == [num_new] * 2
    assert set(tokens[0]) <= set(_IMAGE_IDS)
    assert not set(tokens[1]) & set(_IMAGE_IDS)
    again, _ = engine.run([[_WORD, _BEGIN], [_WORD] * 2], num_new, [True, False])
    assert again == tokens


def test_greedy_answers_do_not_depend_on_the_batch(engine: Engine) -> None:
    prompts = [[_WORD, _BEGIN], [_WORD] * 2, [_WORD + 5, _WORD + 1]]
    together, _ = engine.run(prompts, 3, [True, False, False])
    alone = [engine.run([p], 3, [p[-1] == _BEGIN])[0][0] for p in prompts]
    assert together == alone


def test_the_first_run_of_a_kind_counts_experts_and_later_ones_do_not(engine: Engine) -> None:
    assert engine.settings["prefix_caching"] is False
    engine.run([[_WORD, _BEGIN]], 3, [True])
    engine.run([[_WORD] * 5], 1, [False])
    counted = dict(engine.settings["experts_per_token"])
    assert counted.keys() == {"1x2, 1 draw", "1x5, 0 draw"}
    assert 0 <= counted["1x2, 1 draw"] <= 4
    assert counted["1x5, 0 draw"] is None  # its one token is never computed
    engine.run([[_WORD + 1, _BEGIN]], 3, [True])
    assert engine.settings["experts_per_token"] == counted


def test_what_a_run_touches_is_watched(engine: Engine) -> None:
    """One row says words, one draws the codes of a picture; float32."""
    work = ([[_WORD, _WORD + 1], [_WORD, _BEGIN]], _CODES, [False, True])
    found = engine.touched(*work)
    assert sum(found["parts"].values()) == pytest.approx(found["bytes_per_step"])
    assert found["distinct_experts"].keys() == {"text", "image"}
    assert all(0 <= mean <= 4 for mean in found["distinct_experts"].values())
    # Steps see 3, 4 and 5 tokens of each row; K and V of 2 layers with 4 heads of 8.
    assert found["parts"]["kv"] == 2 * 4 * 2 * 2 * 4 * 8 * 4
    assert engine.touched(*work) == found
    words = engine.touched([[_WORD]], 5, [False])
    assert words["distinct_experts"].keys() == {"text"}
    assert words["parts"]["head"] == 64 * 32 * 4
    codes = engine.touched([[_BEGIN]], _CODES, [True])
    assert codes["parts"]["head"] == len(_IMAGE_IDS) * 32 * 4


def test_memory_is_that_of_this_process(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = engine.memory()
    now, most = memory["resident_bytes"], memory["peak_resident_bytes"]
    assert now is not None and most is not None
    assert 10_000_000 < now <= most
    status = tmp_path / "status"
    monkeypatch.setattr(run_momaserve, "_STATUS", status)
    assert engine.memory() == {"resident_bytes": None, "peak_resident_bytes": None}
    status.write_text("Name:\tpython\nVmHWM:\t  9 kB\nVmRSS:\t  7 kB\n", encoding="utf-8")
    assert engine.memory() == {"resident_bytes": 7 * 1024, "peak_resident_bytes": 9 * 1024}


def test_a_temperature_spreads_tokens_and_rows_draw_by_themselves(small_checkpoint: Path) -> None:
    job = {"dtype": "float32", "threads": 1, "max_batch_size": 2, "kv_cache_bytes": 1 << 20}
    warm = Engine({"model": str(small_checkpoint), "temperature": 5.0, **job})
    tokens, _ = warm.run([[_WORD] * 2] * 2, 20, [False, False])
    assert tokens[0] != tokens[1]
    assert warm.run([[_WORD] * 2] * 2, 20, [False, False])[0] == tokens
    assert warm.settings["max_num_step_tokens"] == 1024


def test_a_preset_may_have_short_pictures_and_long_steps(
    small_engine: momaserve.engine.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preset of the small shape, for the real ones take long to fill."""
    monkeypatch.setattr(engine_setup, "preset_config", lambda name: small_engine.model_config)
    job = {"dtype": "float32", "threads": 1, "max_batch_size": 1, "kv_cache_bytes": 1 << 20}
    more = {"image_tokens": 7, "max_num_step_tokens": 2000}
    preset = Engine({"model": "moma-90m-4t4i", **job, **more})
    tokens, _ = preset.run([[_WORD, _BEGIN]], 7, [True])
    assert len(tokens[0]) == 7 and set(tokens[0]) <= set(_IMAGE_IDS)
    assert preset.settings["max_num_step_tokens"] == 2000
    assert preset.touched([[_BEGIN]], 7, [True])["distinct_experts"].keys() == {"image"}
