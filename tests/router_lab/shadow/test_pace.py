"""How much scoring may take while the engine works, and that it stops when told."""

from __future__ import annotations

import threading

import pytest

from momaserve.router_lab.shadow.pace import DUTY, Pace, StoppedError


class Time(threading.Event):
    """A clock that moves where somebody waits on it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.idle_from = float("inf")

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        assert timeout > 0
        self.now += timeout
        return self.is_set()

    def clock(self) -> float:
        return self.now

    def is_busy(self) -> bool:
        return self.now < self.idle_from

    def pace(self) -> Pace:
        return Pace(self.is_busy, lambda: False, self, clock=self.clock)


def test_beside_a_busy_engine_it_takes_its_share() -> None:
    time = Time()
    pace = time.pace()
    pace.begin()
    for _ in range(5):
        time.now += 0.2  # a piece of work
        pace()
    assert time.now == pytest.approx(5 * 0.2 / DUTY)


def test_an_idle_engine_gives_it_all_the_time() -> None:
    time = Time()
    time.idle_from = 0.0
    pace = time.pace()
    for _ in range(5):
        time.now += 0.2
        pace()
    assert time.now == pytest.approx(1.0)


def test_a_rest_ends_when_the_engine_becomes_idle() -> None:
    time = Time()
    time.idle_from = 3.0
    pace = time.pace()
    time.now += 1.0
    pace()
    assert time.now == pytest.approx(3.0, abs=0.06)


def test_waiting_for_work_is_no_work() -> None:
    time = Time()
    pace = time.pace()
    time.now += 1000.0
    pace.begin()
    pace()
    assert time.now == 1000.0


def test_it_stops_when_closed_or_when_the_engine_drains() -> None:
    time = Time()
    pace = time.pace()
    time.set()
    time.now += 1.0
    with pytest.raises(StoppedError):
        pace()
    assert time.now == 1.0  # without a rest
    drains = Pace(lambda: True, lambda: True, threading.Event(), clock=Time().clock)
    with pytest.raises(StoppedError):
        drains()


def test_a_rest_ends_when_it_is_closed() -> None:
    """Another thread closes it while it rests beside an engine that is always busy."""
    closed, rests = threading.Event(), threading.Event()
    hours = iter([0.0, 3600.0])  # a piece of work of an hour, so the rest would be nine

    def clock() -> float:
        return next(hours, 3600.0)

    def is_busy() -> bool:
        rests.set()
        return True

    pace = Pace(is_busy, lambda: False, closed, clock=clock)
    ends: list[str] = []

    def work() -> None:
        try:
            pace()
        except StoppedError:
            ends.append("stopped")

    thread = threading.Thread(target=work)
    thread.start()
    assert rests.wait(30.0)
    closed.set()
    thread.join(30.0)
    assert ends == ["stopped"]
