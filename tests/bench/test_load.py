"""Sending requests at their times, against a transport that answers as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from momaserve_bench.load import LoadRun, run_load
from momaserve_bench.records import Outcome
from momaserve_bench.target import Target
from momaserve_bench.workload import Kind, WorkItem

TARGET = Target(url="http://server/base", headers={"Authorization": "Bearer k"}, model="m", card={})


def items(count: int, cancel_share: float | None = None) -> list[WorkItem]:
    return [
        WorkItem(
            index=index,
            kind=Kind.TEXT,
            max_tokens=2,
            seed=index,
            token_ids=(30 + index,),
            cancel_share=cancel_share,
        )
        for index in range(count)
    ]


def chunk(token: int) -> bytes:
    return b'data: {"choices": [{"text": "a", "token_ids": [%d]}]}\n\n' % token


class Pieces(httpx.AsyncByteStream):
    """A body in pieces; knows whether it was read to its end and whether it was closed."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces
        self.num_read = 0
        self.is_closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            self.num_read += 1
            yield piece
            await asyncio.sleep(0)

    async def aclose(self) -> None:
        self.is_closed = True


def answer() -> Pieces:
    whole = chunk(1) + chunk(2)
    return Pieces(whole[:9], whole[9:70], whole[70:], b"data: [DONE]\n\n")


def load(
    handler: Callable[[httpx.Request], httpx.Response],
    count: int,
    *,
    cancel_share: float | None = None,
    max_concurrency: int | None = None,
) -> LoadRun:
    return run_load(
        TARGET,
        items(count, cancel_share),
        [0.0] * count,
        salt="s",
        max_concurrency=max_concurrency,
        transport=httpx.MockTransport(handler),
    )


def test_records_every_moment_in_order() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, stream=answer())

    run = load(handler, 3)
    assert [r.outcome for r in run.records] == [Outcome.COMPLETED] * 3
    for r in run.records:
        assert r.sent_s is not None and r.first_byte_s is not None
        assert r.first_token_s is not None and r.last_byte_s is not None
        assert 0 <= r.scheduled_s <= r.sent_s <= r.first_byte_s <= r.first_token_s
        assert r.first_token_s <= r.token_times_s[1] <= r.last_byte_s <= run.duration_s
        assert r.output_tokens == 2
    assert [str(request.url) for request in seen] == ["http://server/base/v1/completions"] * 3
    assert {request.headers["authorization"] for request in seen} == {"Bearer k"}
    assert [json.loads(request.content)["prompt"] for request in seen] == [[30], [31], [32]]


def test_who_is_held_back_counts_from_when_it_was_due() -> None:
    """One at a time: each is sent after the one before it is over, though all were due at 0."""
    running = most = 0

    class Counted(Pieces):
        async def aclose(self) -> None:
            nonlocal running
            running -= 1

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        return httpx.Response(200, stream=Counted(chunk(1), chunk(2), b"data: [DONE]\n\n"))

    run = load(handler, 4, max_concurrency=1)
    assert most == 1
    ordered = sorted(run.records, key=lambda r: r.sent_s or 0)
    for earlier, later in zip(ordered, ordered[1:], strict=False):
        assert later.scheduled_s == 0.0
        assert (later.sent_s or 0) >= (earlier.last_byte_s or 0)
    most = 0
    load(handler, 4)
    assert most > 1


def test_failures_keep_their_reason() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        number = json.loads(request.content)["prompt"][0] - 30
        error = {"error": {"code": "queue_full", "message": "no room"}}
        if number == 0:
            return httpx.Response(429, json=error)
        if number == 1:
            return httpx.Response(502, text="<html>bad gateway")
        if number == 2:
            raise httpx.ConnectError("refused")
        if number == 3:
            return httpx.Response(200, stream=Pieces(chunk(1)))
        if number == 4:
            data = b"event: error\ndata: " + json.dumps(error).encode() + b"\n\n"
            return httpx.Response(200, stream=Pieces(chunk(1), data))
        return httpx.Response(200, stream=answer())

    run = load(handler, 6)
    found = [(r.outcome, r.reason, r.message) for r in run.records]
    failed = Outcome.FAILED
    assert found == [
        (failed, "429 queue_full", "no room"),
        (failed, "502", "<html>bad gateway"),
        (failed, "ConnectError", "refused"),
        (failed, "cut off", "the stream ended before its last event"),
        (failed, "stream queue_full", "no room"),
        (Outcome.COMPLETED, None, None),
    ]


def test_a_cancelled_answer_is_closed_half_way() -> None:
    bodies: list[Pieces] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(answer())
        return httpx.Response(200, stream=bodies[-1])

    run = load(handler, 2, cancel_share=0.5)
    assert [r.outcome for r in run.records] == [Outcome.CANCELLED] * 2
    assert [r.output_tokens for r in run.records] == [1, 1]
    for body in bodies:
        assert body.is_closed and body.num_read < 4


def test_a_request_is_sent_when_it_is_due() -> None:
    times = [0.0, 0.02, 0.04]
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=answer()))
    run = run_load(TARGET, items(3), times, salt="s", transport=transport)
    assert [r.scheduled_s for r in run.records] == times
    assert all((r.sent_s or 0) >= r.scheduled_s for r in run.records)


def test_one_time_for_each() -> None:
    with pytest.raises(ValueError, match="zip"):
        run_load(TARGET, items(2), [0.0], salt="s")
