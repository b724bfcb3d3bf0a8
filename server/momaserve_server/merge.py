"""Several asynchronous streams read as one, each item as soon as it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


async def merged(
    streams: Sequence[AsyncIterator[Item]],
) -> AsyncGenerator[tuple[int, Item], None]:
    """(number of the stream, item) of all `streams`. Does not close them."""
    if len(streams) == 1:  # nearly always, and a task for each item costs more than the item
        async for item in streams[0]:
            yield 0, item
        return
    reading = {_next_of(stream): number for number, stream in enumerate(streams)}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=reading.__getitem__):
                number = reading.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                reading[_next_of(streams[number])] = number
                yield number, item
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


def _next_of(stream: AsyncIterator[Item]) -> asyncio.Task[Item]:
    async def read() -> Item:
        return await anext(stream)

    return asyncio.create_task(read())
