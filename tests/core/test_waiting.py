"""Exact examples of the waiting queue: order, followers, what is counted."""

from __future__ import annotations

import pytest

from momaserve.config import SchedulerConfig
from momaserve.core.waiting import WaitingQueue
from momaserve.request import Request
from tests.core.factory import make_request, make_samples


def fill(*requests: Request) -> WaitingQueue:
    queue = WaitingQueue(SchedulerConfig())
    for order, request in enumerate(requests):
        request.arrival_order = order
        queue.add(request)
    queue.check()
    return queue


def take_all(queue: WaitingQueue) -> str:
    """The ids in the order in which they are offered, each let go at once."""
    names = []
    while (request := queue.peek()) is not None:
        assert queue.peek() is request
        queue.remove(request)
        queue.check()
        names.append(request.request_id)
    return "".join(names)


def test_first_come_first_served() -> None:
    assert take_all(fill(*map(make_request, "abc"))) == "abc"


def test_smaller_priorities_go_first_and_ties_by_arrival() -> None:
    priorities = {"a": 1, "b": 0, "c": -2, "d": 0, "e": 1}
    requests = [make_request(name, priority=p) for name, p in priorities.items()]
    assert take_all(fill(*requests)) == "cbdae"


def test_an_empty_queue_offers_nobody() -> None:
    queue = WaitingQueue(SchedulerConfig())
    assert queue.peek() is None
    assert len(queue) == queue.num_new == queue.num_tokens == 0


def test_counts_prompt_tokens_of_all_followers_included() -> None:
    queue = fill(make_request("x", 3, forced=[1]), *make_samples("abc", 5))
    assert (len(queue), queue.num_new, queue.num_tokens) == (4, 4, 18)
    assert "c" in queue
    assert "z" not in queue


def test_the_preempted_are_in_front_again_and_are_not_counted() -> None:
    a, b, c = map(make_request, "abc")
    queue = fill(a, b, c)
    queue.remove(a)
    queue.remove(b)
    queue.put_back(b)
    queue.put_back(a)
    queue.check()
    assert (len(queue), queue.num_new, queue.num_tokens) == (3, 1, 4)
    assert take_all(queue) == "abc"
    assert (len(queue), queue.num_new, queue.num_tokens) == (0, 0, 0)


def test_the_preempted_stay_behind_those_with_a_better_priority() -> None:
    a, b = make_request("a"), make_request("b", priority=-1)
    queue = fill(a, b)
    queue.remove(a)
    queue.put_back(a)
    assert take_all(queue) == "ba"


def test_whoever_is_let_go_from_the_middle_is_not_offered() -> None:
    a, b, c = map(make_request, "abc")
    queue = fill(a, b, c)
    queue.remove(b)
    queue.check()
    assert queue.num_tokens == 8
    assert take_all(queue) == "ac"


def test_an_id_that_is_used_again_is_offered_once() -> None:
    a, b, again = make_request("a"), make_request("b"), make_request("b", 7)
    queue = fill(a, b)
    queue.remove(b)
    again.arrival_order = 2
    queue.add(again)
    queue.check()
    assert queue.num_tokens == 11
    queue.remove(a)
    assert queue.peek() is again


def test_followers_stay_behind_their_leader() -> None:
    a, b, c = make_samples("abc")
    x = make_request("x")
    queue = fill(a, b, c, x)
    assert queue.peek() is a
    queue.remove(a)  # it starts
    assert queue.peek() is x
    queue.check()
    assert queue.take_followers("a") == [b, c]
    assert queue.take_followers("a") == []
    assert len(queue) == 3  # they are still there, and go one way or the other
    queue.remove(b)
    queue.release(c)
    queue.check()
    assert take_all(queue) == "cx"


def test_if_the_leader_ends_the_next_follower_leads() -> None:
    a, b, c, d = make_samples("abcd")
    queue = fill(a, make_request("x"), b, c, d)
    queue.remove(a)
    queue.replace_leader("a")
    queue.check()
    assert [r.leader_id for r in (b, c, d)] == [None, "b", "b"]
    assert [request.request_id for request in (queue.peek(),) if request] == ["x"]
    queue.remove(b)
    queue.replace_leader("b")
    queue.check()
    assert [r.leader_id for r in (c, d)] == [None, "c"]
    assert queue.take_followers("c") == [d]
    queue.release(d)
    assert take_all(queue) == "xcd"


def test_a_follower_may_end_while_it_stands_behind_its_leader() -> None:
    a, b, c = make_samples("abc")
    queue = fill(a, b, c)
    queue.remove(b)
    queue.check()
    assert queue.num_tokens == 8
    assert queue.take_followers("a") == [c]


def test_replacing_a_leader_without_followers_changes_nothing() -> None:
    queue = fill(make_request("a"))
    queue.replace_leader("a")
    queue.replace_leader("nobody")
    queue.check()
    assert take_all(queue) == "a"


def test_those_that_gave_up_are_not_remembered() -> None:
    """Behind a head that waits for long, others come and time out without end."""
    queue = fill(make_request("head", priority=-1))
    for order in range(1, 1001):
        request = make_request("other")
        request.arrival_order = order
        queue.add(request)
        queue.remove(request)
    assert len(queue) == 1
    assert sum(map(len, queue._lanes.values())) < 100


def test_check_finds_a_lost_request() -> None:
    queue = fill(*make_samples("ab"))
    queue.take_followers("a")
    with pytest.raises(AssertionError, match="a waiting request is lost"):
        queue.check()


def test_check_finds_a_miscount() -> None:
    queue = fill(make_request("a"))
    queue.num_tokens += 1
    with pytest.raises(AssertionError):
        queue.check()
