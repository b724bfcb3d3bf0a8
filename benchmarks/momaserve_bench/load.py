"""Sends requests at their times and records what comes back: an open loop over asyncio."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass

import httpx

from momaserve_bench.bodies import http_request
from momaserve_bench.records import AnswerReader, FailedRequestError, Outcome, RequestRecord
from momaserve_bench.target import Target
from momaserve_bench.workload import WorkItem
from momaserve_client.errors import BadReplyError
from momaserve_client.sse import SSEDecoder

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 600.0
"""Between two pieces of an answer, and before the first."""
MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """All requests of a run, in their order, and how long it took."""

    records: list[RequestRecord]
    duration_s: float
    """From the start to the last byte of the last answer."""


def run_load(
    target: Target,
    items: Sequence[WorkItem],
    times_s: Sequence[float],
    *,
    salt: str,
    max_concurrency: int | None = None,
    partial_images: int = 0,
    transport: httpx.AsyncBaseTransport | None = None,
) -> LoadRun:
    """Sends each of `items` when it is due, whether others are answered or not.

    Args:
        times_s: when each is due, from the start.
        salt: requests share computed prefixes only with those of runs with the same salt.
        max_concurrency: more than these are not under way; who is due then waits.
        transport: httpx's seam for tests.
    """
    prepared = [
        http_request(item, model=target.model, salt=salt, partial_images=partial_images)
        for item in items
    ]
    return asyncio.run(_Load(target, items, prepared, max_concurrency).run(times_s, transport))


class _Load:
    def __init__(
        self,
        target: Target,
        items: Sequence[WorkItem],
        prepared: Sequence[tuple[str, bytes]],
        max_concurrency: int | None,
    ) -> None:
        self._target = target
        self._items = items
        self._prepared = prepared
        self._max_concurrency = max_concurrency
        self._started = 0.0

    def _now(self) -> float:
        return time.perf_counter() - self._started

    async def run(
        self, times_s: Sequence[float], transport: httpx.AsyncBaseTransport | None
    ) -> LoadRun:
        records = [
            RequestRecord(index=item.index, kind=item.kind, scheduled_s=due)
            for item, due in zip(self._items, times_s, strict=True)
        ]
        limit = self._max_concurrency
        slots = nullcontext() if limit is None else asyncio.Semaphore(limit)
        client = httpx.AsyncClient(
            base_url=self._target.url,
            headers={**self._target.headers, "Content-Type": "application/json"},
            timeout=httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            transport=transport,
            trust_env=False,  # a proxy would be measured too
        )
        async with client, asyncio.TaskGroup() as group:
            self._started = time.perf_counter()
            for number, record in enumerate(records):
                delay = record.scheduled_s - self._now()
                if delay > 0:
                    await asyncio.sleep(delay)
                group.create_task(self._one(client, slots, number, record))
        return LoadRun(records=records, duration_s=max(r.last_byte_s or 0.0 for r in records))

    async def _one(
        self,
        client: httpx.AsyncClient,
        slots: asyncio.Semaphore | nullcontext[None],
        number: int,
        record: RequestRecord,
    ) -> None:
        async with slots:
            try:
                record.outcome = await self._exchange(client, number, record)
            except FailedRequestError as error:
                record.fail(error.reason, str(error))
            except (httpx.HTTPError, BadReplyError) as error:
                record.fail(type(error).__name__, str(error) or type(error).__name__)
            record.last_byte_s = self._now()

    async def _exchange(
        self, client: httpx.AsyncClient, number: int, record: RequestRecord
    ) -> Outcome:
        path, body = self._prepared[number]
        reader, decoder = AnswerReader(record, self._items[number]), SSEDecoder()
        request = client.build_request("POST", path, content=body)
        record.sent_s = self._now()
        response = await client.send(request, stream=True)
        async with aclosing(response):
            if response.status_code != httpx.codes.OK:
                raise _refusal(response.status_code, await response.aread())
            async for piece in response.aiter_raw():
                now = self._now()
                if record.first_byte_s is None:
                    record.first_byte_s = now
                for event in decoder.feed(piece):
                    reader.take(event.event, event.data, now)
                    if reader.is_due_to_cancel:
                        return Outcome.CANCELLED
        reader.finish()
        return Outcome.COMPLETED


def _refusal(status: int, body: bytes) -> FailedRequestError:
    """What a bad status means, with the API's own code if it has one."""
    try:
        error = json.loads(body)["error"]
        return FailedRequestError(f"{status} {error['code']}", str(error["message"]))
    except (ValueError, KeyError, TypeError):
        shown = body[:MAX_ERROR_CHARS].decode(errors="replace")
        return FailedRequestError(str(status), shown)
