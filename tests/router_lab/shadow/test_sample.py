"""Which requests are picked, and the queue that they wait in."""

from __future__ import annotations

import threading

import pytest

from momaserve.router_lab.shadow.sample import Sample, SampleQueue, is_picked
from tests.router_lab.shadow.factory import CAUSAL, HANG_S, WHOLE, sample

NAMES = [f"chatcmpl-{number}/0" for number in range(4000)]


def test_a_rate_of_one_picks_all_and_of_zero_none() -> None:
    assert all(is_picked(name, 1.0) for name in NAMES)
    assert not any(is_picked(name, 0.0) for name in NAMES)


def test_half_is_half_and_the_same_half_each_time() -> None:
    picked = [name for name in NAMES if is_picked(name, 0.5)]
    assert picked == [name for name in reversed(NAMES) if is_picked(name, 0.5)][::-1]
    assert len(picked) == pytest.approx(2000, abs=130)  # four standard deviations
    assert picked != [name for name in NAMES if is_picked(name, 0.5, seed=1)]


def test_a_higher_rate_picks_the_same_and_more() -> None:
    few, more = ({name for name in NAMES if is_picked(name, rate)} for rate in (0.1, 0.3))
    assert few < more


def test_a_sample_is_prompt_and_answer() -> None:
    made = Sample.of((5, 6, 7), [8, 9], CAUSAL, WHOLE)
    assert made.token_ids.tolist() == [5, 6, 7, 8, 9]
    assert (made.num_prompt_tokens, made.num_tokens) == (3, 5)
    assert (made.routing, made.prompt_routing) == (CAUSAL, WHOLE)


def test_samples_come_out_in_order() -> None:
    waiting = SampleQueue()
    given = [sample([number, 1, 2]) for number in range(3)]
    assert [waiting.offer(each) for each in given] == [0, 0, 0]
    assert waiting.num_tokens == 9
    assert [waiting.get(None) for _ in given] == given
    assert waiting.num_tokens == 0
    assert waiting.get(0.0) is None


def test_the_oldest_make_room() -> None:
    waiting = SampleQueue(max_num_tokens=10)
    first, second, third = (sample([number] * 4) for number in range(3))
    assert (waiting.offer(first), waiting.offer(second)) == (0, 0)
    assert waiting.offer(third) == 1
    assert waiting.num_tokens == 8
    large = sample([9] * 10)
    assert waiting.offer(large) == 2
    assert waiting.get(None) is large
    assert waiting.get(0.0) is None


def test_one_that_is_larger_than_the_queue_waits_alone() -> None:
    waiting = SampleQueue(max_num_tokens=10)
    waiting.offer(sample([1, 2]))
    large = sample([9] * 11)
    assert waiting.offer(large) == 1
    assert waiting.offer(sample([1, 2])) == 1
    assert waiting.num_tokens == 2


def test_closing_forgets_all_and_wakes_who_waits() -> None:
    waiting = SampleQueue()
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(waiting.get(None)))
    thread.start()
    waiting.close()
    thread.join(HANG_S)
    assert found == [None]
    assert waiting.offer(sample([1, 2, 3])) == 0
    assert waiting.num_tokens == 0
    assert waiting.get(None) is None
