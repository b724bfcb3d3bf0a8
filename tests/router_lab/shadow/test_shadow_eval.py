"""The thread: what it scores and when, what it leaves out, how it fails and how it ends."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from momaserve.errors import ConfigError
from momaserve.models.moma import MomaModel
from momaserve.router_lab.shadow import shadow_eval as module
from momaserve.router_lab.shadow.batch import BatchRule
from momaserve.router_lab.shadow.evaluation import evaluate
from momaserve.router_lab.shadow.shadow_eval import ShadowEval
from tests.router_lab.shadow.factory import (
    CALIBRATED,
    CAUSAL,
    HANG_S,
    SMALL,
    Watched,
    documents,
    sample,
    tiny,
)

SECRET = 4242
"""A token id that no vocabulary here has."""


def made(model: MomaModel, **options: Any) -> ShadowEval:
    fields: dict[str, Any] = {"rate": 1.0, "policy": CAUSAL, "max_model_len": 256, "rule": SMALL}
    return ShadowEval(model, **(fields | options))


@contextmanager
def running(shadow_eval: ShadowEval) -> Iterator[Watched]:
    watched = Watched(shadow_eval)
    shadow_eval.start()
    try:
        yield watched
    finally:
        shadow_eval.close()


def thread_of(shadow_eval: ShadowEval) -> threading.Thread:
    assert shadow_eval._thread is not None
    return shadow_eval._thread


def test_it_scores_what_it_gathered(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    samples = [sample(ids, 3) for ids in documents(tmp_path)]
    num_tokens = sum(each.num_tokens for each in samples)
    rule = replace(SMALL, num_tokens=num_tokens)
    with running(made(model, rule=rule)) as watched:
        for each in samples:
            watched.shadow_eval.offer(each)
        found = watched.next_batch()
        totals = watched.shadow_eval.totals.findings()
    wanted = evaluate(model, samples, CAUSAL, min_tokens=SMALL.min_tokens)
    assert found is not None
    assert found.confusion.keys() == wanted.confusion.keys()
    for site, counts in found.confusion.items():
        assert counts.tolist() == wanted.confusion[site].tolist()
    assert totals.num_requests == 3
    assert sum(totals.tokens.values()) == num_tokens
    assert (totals.num_dropped, totals.num_failed) == (0, 0)


def test_a_batch_is_scored_when_its_time_is_up(tmp_path: Path) -> None:
    """A second passes at each look on the clock, so nothing is waited for."""
    ticks = iter(range(10**6))
    model = tiny(tmp_path)
    ids = documents(tmp_path, 1)[0]
    rule = BatchRule(num_tokens=10**6, min_tokens=4, max_wait_s=0.5, max_num_tokens=10**7)
    with running(made(model, rule=rule, clock=lambda: float(next(ticks)))) as watched:
        watched.shadow_eval.offer(sample(ids))
        found = watched.next_batch()
    assert found is not None
    assert found.num_tokens == len(ids)


def test_short_answers_are_left_out_and_long_samples_dropped(tmp_path: Path) -> None:
    shadow_eval = made(tiny(tmp_path), max_model_len=10)
    shadow_eval.offer(sample([1, 2, 3], 2))  # an answer of one token
    shadow_eval.offer(sample([1, 2, 3], 3))
    assert shadow_eval.num_waiting_tokens == 0
    assert shadow_eval.totals.findings().num_dropped == 0
    shadow_eval.offer(sample([1] * 11))
    assert shadow_eval.num_waiting_tokens == 0
    assert shadow_eval.totals.findings().num_dropped == 1
    shadow_eval.offer(sample([1] * 10))
    shadow_eval.offer(sample([1] * 4))
    assert shadow_eval.num_waiting_tokens == 14


def test_the_oldest_are_dropped_and_counted(tmp_path: Path) -> None:
    shadow_eval = made(tiny(tmp_path), max_queued_tokens=12)
    for _ in range(5):
        shadow_eval.offer(sample([1, 2, 3, 4]))
    assert shadow_eval.num_waiting_tokens == 12
    assert shadow_eval.totals.findings().num_dropped == 2


def test_a_failure_is_logged_once_and_counted_and_quotes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tmp_path)
    good = sample(documents(tmp_path, 2)[1], 3)

    def quoting(*args: Any, **options: Any) -> Any:
        if SECRET in args[1][0].token_ids:
            raise IndexError(f"token {SECRET} is out of range")
        return evaluate(*args, **options)

    monkeypatch.setattr(module, "evaluate", quoting)
    rule = replace(SMALL, num_tokens=good.num_tokens)
    with caplog.at_level(logging.DEBUG), running(made(model, rule=rule)) as watched:
        for _ in range(2):
            watched.shadow_eval.offer(sample([SECRET] * good.num_tokens))
            assert watched.next_batch() is None
        watched.shadow_eval.offer(good)
        assert watched.next_batch() is not None
        found = watched.shadow_eval.totals.findings()
    assert (found.num_failed, found.num_requests) == (2, 1)
    (record,) = [r for r in caplog.records if r.name == module.__name__]
    assert record.levelno == logging.ERROR
    assert "IndexError" in record.getMessage()
    assert "quoting" in record.getMessage()  # where it was
    assert str(SECRET) not in caplog.text
    assert record.exc_info is None


def test_ids_outside_the_vocabulary_fail_and_end_nothing(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    with running(made(model)) as watched:
        watched.shadow_eval.offer(sample([SECRET] * 40))
        assert watched.next_batch() is None
        assert thread_of(watched.shadow_eval).is_alive()


def test_closing_ends_a_thread_that_waits(tmp_path: Path) -> None:
    shadow_eval = made(tiny(tmp_path))
    shadow_eval.start()
    shadow_eval.close()
    assert not thread_of(shadow_eval).is_alive()
    shadow_eval.offer(sample([1, 2, 3, 4]))
    assert shadow_eval.num_waiting_tokens == 0


def test_closing_gives_a_batch_up_that_rests(tmp_path: Path) -> None:
    """The engine is busy for ever, and every piece of work took an hour."""
    hours = iter(range(0, 10**9, 3600))
    rests = threading.Event()

    def is_busy() -> bool:
        rests.set()
        return True

    model = tiny(tmp_path)
    shadow_eval = made(model, is_busy=is_busy, clock=lambda: float(next(hours)))
    shadow_eval.start()
    for ids in documents(tmp_path):
        shadow_eval.offer(sample(ids, 3))
    assert rests.wait(HANG_S)
    shadow_eval.close()
    thread_of(shadow_eval).join(HANG_S)
    assert not thread_of(shadow_eval).is_alive()
    found = shadow_eval.totals.findings()
    assert (found.num_requests, found.num_failed) == (0, 0)


def test_a_draining_engine_ends_it(tmp_path: Path) -> None:
    draining = threading.Event()
    shadow_eval = made(tiny(tmp_path), is_stopping=draining.is_set)
    shadow_eval.start()
    draining.set()
    shadow_eval.offer(sample([1, 2, 3, 4]))  # wakes it
    thread_of(shadow_eval).join(HANG_S)
    assert not thread_of(shadow_eval).is_alive()
    assert shadow_eval.num_waiting_tokens == 0
    shadow_eval.close()


def test_closing_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single piece of work that does not end: the thread is left behind, being a daemon."""
    monkeypatch.setattr(module, "CLOSE_TIMEOUT_S", 0.01)
    began, may_end = threading.Event(), threading.Event()

    def endless(*args: Any, **options: Any) -> Any:
        began.set()
        may_end.wait(HANG_S)
        return evaluate(*args, **options)

    monkeypatch.setattr(module, "evaluate", endless)
    shadow_eval = made(tiny(tmp_path))
    shadow_eval.start()
    shadow_eval.offer(sample(documents(tmp_path, 2)[1]))
    assert began.wait(HANG_S)
    shadow_eval.close()
    assert thread_of(shadow_eval).is_alive()
    assert thread_of(shadow_eval).daemon
    may_end.set()
    thread_of(shadow_eval).join(HANG_S)
    assert not thread_of(shadow_eval).is_alive()


def test_it_computes_with_one_thread_and_leaves_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    seen: dict[str, int] = {}

    def look(*args: Any, **options: Any) -> Any:
        seen["scoring"] = torch.get_num_threads()
        if sys.platform == "linux":
            seen["nice"] = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        return evaluate(*args, **options)

    monkeypatch.setattr(module, "evaluate", look)
    model = tiny(tmp_path)
    torch.set_num_threads(3)
    try:
        with running(made(model)) as watched:
            late = threading.Thread(target=lambda: seen.update(late=torch.get_num_threads()))
            late.start()
            late.join()
            watched.shadow_eval.offer(sample(documents(tmp_path, 2)[1]))
            assert watched.next_batch() is not None
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert (seen["scoring"], seen["late"]) == (1, 3)
    if sys.platform == "linux":
        assert seen["nice"] == 19
        assert os.getpriority(os.PRIO_PROCESS, 0) == priority


@pytest.mark.parametrize("case", ["dense_post", "1t1i_post"])
def test_a_model_without_routers_is_refused(case: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shadow_eval 0\.25: .*one expert in every group"):
        made(tiny(tmp_path, case), rate=0.25)


@pytest.mark.parametrize(
    ("policy", "missing", "words"),
    [
        (CAUSAL, {"aux_routers": False}, "no auxiliary routers"),
        (CALIBRATED, {"thresholds": False}, "no router thresholds"),
    ],
)
def test_a_model_that_lacks_what_is_to_be_compared_is_refused(
    policy: Any, missing: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = tiny(tmp_path, "4t4i_post", **missing)
    with pytest.raises(ConfigError, match=f"shadow_eval 1: this checkpoint has {words}"):
        made(model, policy=policy)


def test_a_model_whose_weights_are_gone_is_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    weight = next(p for p in model.blocks.parameters() if p.dim() >= 2)
    weight.data = weight.data.new_empty(0)
    with pytest.raises(ConfigError, match="keep_weights"):
        made(model)


def test_groups_of_one_expert_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shadow_eval = made(tiny(tmp_path, "uneven_post"))
    assert shadow_eval.not_routed == ("codes",)
    assert shadow_eval.totals.kinds == ("words",)
    with caplog.at_level(logging.INFO), running(shadow_eval):
        pass
    assert "codes" in caplog.text


@pytest.mark.parametrize(("rate", "share"), [(1.0, 1.0), (0.5, 0.5)])
def test_names_are_picked_by_rate(rate: float, share: float, tmp_path: Path) -> None:
    model = tiny(tmp_path)
    first, second = made(model, rate=rate), made(model, rate=rate)
    names = [f"chatcmpl-{number}/0" for number in range(2000)]
    picked = [name for name in names if first.picks(name)]
    assert picked == [name for name in names if second.picks(name)]
    assert len(picked) / len(names) == pytest.approx(share, abs=0.05)
