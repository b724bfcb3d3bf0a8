"""A few threads for work that would hold up the event loop: tokenising, pixels, big JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.to_thread

Result = TypeVar("Result")
Args = TypeVarTuple("Args")


class Workers:
    """Runs functions in threads, at most `num_threads` at a time; more wait their turn.

    Few threads on purpose: they share the interpreter lock with the engine.
    """

    def __init__(self, num_threads: int) -> None:
        self._limiter = anyio.CapacityLimiter(num_threads)

    async def run(self, function: Callable[[*Args], Result], *args: *Args) -> Result:
        return await anyio.to_thread.run_sync(function, *args, limiter=self._limiter)
