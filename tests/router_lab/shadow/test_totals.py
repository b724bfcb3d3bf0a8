"""Counts since the start, and the window of the last tokens."""

from __future__ import annotations

import numpy as np
import pytest

from momaserve.router_lab.shadow.evaluation import EXPERT_CHOICE, SERVED, Evaluation
from momaserve.router_lab.shadow.totals import ADDED, MISSED, Totals


class Clock:
    """Unix seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def batch(
    tokens: int = 10,
    text: list[list[int]] | None = None,
    nat: float = 1.0,
    requests: int = 1,
) -> Evaluation:
    """One layer of two experts for words; `text` is their confusion."""
    confusion = {} if text is None else {"0.text": np.array(text, dtype=np.int64)}
    sums = np.array([nat, 0, tokens, 0], dtype=np.float64)
    return Evaluation(
        num_requests=requests,
        by_modality={"text": tokens, "image": 0},
        confusion=confusion,
        losses={EXPERT_CHOICE: sums, SERVED: 2 * sums},
    )


def test_everything_begins_at_zero() -> None:
    found = Totals(["text", "depth"], clock=Clock()).findings()
    assert (found.num_requests, found.num_dropped, found.num_failed) == (0, 0, 0)
    assert found.tokens == {"text": 0, "image": 0}
    assert found.decisions == {"text": 0, "depth": 0}
    assert found.flips == dict.fromkeys(
        [("text", MISSED), ("text", ADDED), ("depth", MISSED), ("depth", ADDED)], 0
    )
    assert (found.since, found.window_since, found.window_tokens) == (100.0, None, 0)
    assert not found.confusion
    assert [sums.tolist() for sums in found.losses.values()] == [[0.0] * 4] * 2
    assert found.of_kind("text").tolist() == [0] * 4


def test_counts_add_up() -> None:
    totals = Totals(["text"], clock=Clock())
    totals.add(batch(10, [[5, 1, 2, 2], [4, 3, 1, 2]], nat=3.0, requests=4))
    totals.add(batch(20, [[9, 0, 1, 10], [8, 2, 0, 10]], nat=1.0))
    totals.on_dropped(3)
    totals.on_dropped(0)
    assert totals.on_failed()
    assert not totals.on_failed()
    found = totals.findings()
    assert (found.num_requests, found.num_dropped, found.num_failed) == (5, 3, 2)
    assert found.tokens == {"text": 30, "image": 0}
    assert found.decisions == {"text": 60}
    assert found.flips == {("text", MISSED): 4, ("text", ADDED): 6}
    assert found.confusion["0.text"].tolist() == [[14, 1, 3, 12], [12, 5, 1, 12]]
    assert found.of_kind("text").tolist() == [26, 6, 4, 24]
    assert found.losses[EXPERT_CHOICE].tolist() == [4.0, 0, 30, 0]
    assert found.losses[SERVED].tolist() == [8.0, 0, 60, 0]


def test_the_window_keeps_as_few_batches_as_have_its_tokens() -> None:
    clock = Clock()
    totals = Totals(["text"], window_tokens=20, clock=clock)
    for number, tokens in enumerate((10, 12, 9, 30)):
        clock.now = 200.0 + number
        totals.add(batch(tokens, [[tokens, 0, 0, number], [0, 0, tokens, 0]], nat=number))
        windows = {0: (10, 200.0), 1: (22, 200.0), 2: (21, 201.0), 3: (30, 203.0)}
        found = totals.findings()
        assert (found.window_tokens, found.window_since) == windows[number]
    assert found.confusion["0.text"].tolist() == [[30, 0, 0, 3], [0, 0, 30, 0]]
    assert found.losses[EXPERT_CHOICE].tolist() == [3.0, 0, 30, 0]
    assert found.decisions == {"text": 2 * (10 + 12 + 9 + 30) + 6}  # counters forget nothing
    assert found.since == 100.0


def test_a_router_that_left_the_window_counts_nothing() -> None:
    totals = Totals(["text"], window_tokens=10, clock=Clock())
    totals.add(batch(10, [[1, 1, 1, 1], [1, 1, 1, 1]]))
    totals.add(batch(10))
    assert totals.findings().of_kind("text").tolist() == [0] * 4


def test_findings_stay_as_they_were() -> None:
    totals = Totals(["text"], clock=Clock())
    totals.add(batch(10, [[1, 0, 0, 0], [0, 0, 0, 1]]))
    before = totals.findings()
    totals.add(batch(10, [[1, 0, 0, 0], [0, 0, 0, 1]]))
    assert before.confusion["0.text"].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert before.tokens["text"] == 10


def test_a_kind_that_nobody_announced_is_counted_too() -> None:
    totals = Totals([], clock=Clock())
    totals.add(batch(4, [[1, 2, 0, 1], [4, 0, 0, 0]]))
    assert totals.findings().flips == {("text", MISSED): 0, ("text", ADDED): 2}
    assert totals.findings().decisions == pytest.approx({"text": 8})
