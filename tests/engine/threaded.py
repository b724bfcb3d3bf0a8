"""What tests of the engine thread share: a gate before its steps, and a listener to wait on.

Nothing sleeps: a test chooses every interleaving by shutting the gate.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from momaserve.async_engine import AsyncEngine, GenerationStream
from momaserve.engine import Engine
from momaserve.outputs import FinishReason, RequestStats, TokenOutput
from momaserve.sampling import SamplingParams
from momaserve.tokens.prompt import Prompt
from tests.engine.driver import WORDS, Recorder

HANG_S = 30.0
"""A test that gets here hangs."""
PROMPT = Prompt(tuple(WORDS))
Result = TypeVar("Result")


def params_of(max_tokens: int = 6, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "seed": 1, "ignore_eos": True, **fields})


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(coroutine, HANG_S))


class Gate:
    """Lets the engine's steps through one by one once it is shut."""

    def __init__(self, engine: Engine) -> None:
        self._step = engine.step
        self._permits = threading.Semaphore(0)
        self._waiting: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_shut = False
        self.num_steps = 0
        self.num_empty_steps = 0
        engine.step = self._gated  # type: ignore[method-assign]

    def _gated(self) -> list[TokenOutput]:
        if self._is_shut:
            self._waiting.put(None)
            assert self._permits.acquire(timeout=HANG_S)
        outputs = self._step()
        self.num_steps += 1
        self.num_empty_steps += not outputs
        return outputs

    def shut(self) -> None:
        self._is_shut = True

    def open(self) -> None:
        self._is_shut = False
        self._permits.release()

    def let_pass(self) -> None:
        """One more step."""
        self._permits.release()

    async def reached(self) -> None:
        """Until the engine thread stands before a step."""
        await asyncio.to_thread(self._waiting.get, True, HANG_S)


class Ending(Recorder):
    """Also lets a test wait for the end of requests."""

    def __init__(self) -> None:
        super().__init__()
        self._ends: queue.SimpleQueue[FinishReason] = queue.SimpleQueue()

    def on_finished(self, stats: RequestStats) -> None:
        super().on_finished(stats)
        self._ends.put(stats.finish_reason)

    async def next_end(self) -> FinishReason:
        return await asyncio.to_thread(self._ends.get, True, HANG_S)


@contextmanager
def serving(engine: Engine, gate: Gate | None = None) -> Iterator[tuple[AsyncEngine, Ending]]:
    listener = Ending()
    served = AsyncEngine(engine, listener=listener)
    served.start()
    try:
        yield served, listener
    finally:
        if gate is not None:
            gate.open()
        served.close()


async def tokens_of(stream: GenerationStream, index: int = 0) -> list[int]:
    return [
        token async for item in stream if item.index == index for token in item.output.token_ids
    ]


async def reasons_of(stream: GenerationStream) -> dict[int, FinishReason | None]:
    """The last finish reason of each choice; all outputs are read."""
    return {item.index: item.output.finish_reason async for item in stream}
