"""Our own side of the comparison: the real engine behind the protocol, on a small checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

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
