"""Answers that come event by event, as iterators that own their connection."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from types import TracebackType
from typing import Any, Generic, TypeVar

from momaserve_client.events import EventReader
from momaserve_client.exchange import Exchange

Event = TypeVar("Event")


class _Head:
    """What is known of a stream beside its events."""

    def __init__(self, exchange: Exchange, reader: EventReader[Any]) -> None:
        self._exchange = exchange
        self._reader = reader

    @property
    def request_id(self) -> str:
        """For the server's log and for `abort`; known before the request is sent."""
        return self._exchange.request_id

    @property
    def id(self) -> str | None:
        """The reply's id, once an event has named it; the images routes name none."""
        return self._reader.reply_id


class Stream(_Head, Generic[Event]):
    """Events of one answer. The request is sent when the first is asked for.

    Owns the connection: leaving the `with` block, `close`, or dropping the last reference
    closes it wherever it is, and the server stops working on the request. Iterating raises
    `ClientError`s, as `Client` says. Not for more than one thread; another one can stop it
    with `client.abort(stream.request_id)`.
    """

    def __init__(
        self,
        exchange: Exchange,
        reader: EventReader[Event],
        events: Generator[Event, None, None],
    ) -> None:
        super().__init__(exchange, reader)
        self._events = events

    def __enter__(self) -> Stream[Event]:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Stream[Event]:
        return self

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """May be called more than once; afterwards there are no more events."""
        self._events.close()


class AsyncStream(_Head, Generic[Event]):
    """The same for `async with` and `async for`.

    Close it, or leave its `async with` block: a reference that is dropped is closed by the event
    loop only when it gets to it.
    """

    def __init__(
        self,
        exchange: Exchange,
        reader: EventReader[Event],
        events: AsyncGenerator[Event, None],
    ) -> None:
        super().__init__(exchange, reader)
        self._events = events

    async def __aenter__(self) -> AsyncStream[Event]:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncStream[Event]:
        return self

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def aclose(self) -> None:
        """May be called more than once; afterwards there are no more events."""
        await self._events.aclose()
