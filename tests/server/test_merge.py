"""Several streams as one: nothing lost, nothing late, nothing left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from momaserve_server.merge import merged

pytestmark = pytest.mark.anyio


async def numbers(*values: int) -> AsyncGenerator[int, None]:
    for value in values:
        yield value


async def test_everything_arrives_in_the_order_of_its_stream() -> None:
    found = [item async for item in merged([numbers(1, 2, 3), numbers(), numbers(7, 8)])]
    assert sorted(found) == [(0, 1), (0, 2), (0, 3), (2, 7), (2, 8)]
    assert [value for number, value in found if number == 0] == [1, 2, 3]


async def test_no_streams_is_an_empty_stream() -> None:
    nothing: list[AsyncGenerator[int, None]] = []
    assert [item async for item in merged(nothing)] == []


async def test_slow_stream_does_not_hold_up_the_others() -> None:
    gate = asyncio.Event()

    async def slow() -> AsyncGenerator[int, None]:
        await gate.wait()
        yield 9

    async with aclosing(merged([slow(), numbers(1, 2)])) as items:
        assert [await anext(items), await anext(items)] == [(1, 1), (1, 2)]
        gate.set()
        assert await anext(items) == (0, 9)


async def test_error_of_one_stream_is_raised_and_the_others_are_cancelled() -> None:
    cancelled = asyncio.Event()

    async def waits() -> AsyncGenerator[int, None]:
        try:
            await asyncio.Event().wait()
            yield 0
        finally:
            cancelled.set()

    async def fails() -> AsyncGenerator[int, None]:
        yield 1
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        _ = [item async for item in merged([waits(), fails()])]
    assert cancelled.is_set()


async def test_closing_early_cancels_the_reading() -> None:
    cancelled = asyncio.Event()

    async def waits() -> AsyncGenerator[int, None]:
        try:
            await asyncio.Event().wait()
            yield 0
        finally:
            cancelled.set()

    async with aclosing(merged([waits(), numbers(1)])) as items:
        assert await anext(items) == (1, 1)
    assert cancelled.is_set()
