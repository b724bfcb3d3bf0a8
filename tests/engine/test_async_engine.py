"""The engine on its thread: streams, aborts, draining, death, idleness. Nothing here sleeps.

`Gate` holds the engine thread before a step, so that every interleaving is chosen by the test.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from momaserve import async_engine as module
from momaserve.async_engine import AsyncEngine, GenerationStream
from momaserve.engine import Engine
from momaserve.errors import EngineDeadError, PromptError, QueueFullError, RequestError
from momaserve.outputs import FinishReason, TokenOutput
from momaserve.sampling import SamplingParams
from momaserve.stats import RequestStats
from momaserve.tokens.prompt import Prompt
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import WORDS, Recorder, answer, make_engine

HANG_S = 4.0
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


@pytest.fixture
def engine(checkpoint_for: CheckpointFor) -> Engine:
    return make_engine(checkpoint_for("4t4i_post"))


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


# --- streams -------------------------------------------------------------------------------


def test_a_stream_brings_what_the_engine_makes(engine: Engine) -> None:
    wanted = answer(engine, max_tokens=6, ignore_eos=True)

    async def main(served: AsyncEngine) -> None:
        stream = await served.generate(PROMPT, params_of())
        items = [item async for item in stream]
        assert [t for item in items for t in item.output.token_ids] == wanted
        assert [item.output.finish_reason for item in items] == [None] * 5 + [FinishReason.LENGTH]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    with serving(engine) as (served, _):
        run(main(served))


def test_choices_of_one_stream_are_told_apart(engine: Engine) -> None:
    wanted = [answer(engine, max_tokens=5, ignore_eos=True, seed=seed) for seed in (7, 8, 9)]

    async def main(served: AsyncEngine) -> None:
        stream = await served.generate(PROMPT, params_of(5, seed=7, n=3), request_id="r")
        assert stream.choice_ids == ("r-0", "r-1", "r-2")
        got: list[list[int]] = [[], [], []]
        async for item in stream:
            got[item.index] += item.output.token_ids
        assert got == wanted

    with serving(engine) as (served, _):
        run(main(served))


def test_closing_a_stream_frees_its_blocks(engine: Engine) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine, listener: Ending) -> None:
        gate.shut()
        stream = await served.generate(PROMPT, params_of(50, n=2))
        await gate.reached()
        gate.let_pass()
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        gate.open()
        assert [await listener.next_end() for _ in range(2)] == [FinishReason.ABORT] * 2
        assert [item async for item in stream] == []

    with serving(engine, gate) as (served, listener):
        run(main(served, listener))
    assert engine.scheduler.kv_cache.usage == 0
    assert not engine.has_work


def test_a_reader_that_waits_learns_of_the_close(engine: Engine) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine) -> None:
        gate.shut()
        stream = await served.generate(PROMPT, params_of())
        reader = asyncio.create_task(tokens_of(stream))
        await gate.reached()
        await asyncio.sleep(0)  # lets the reader start to wait
        await stream.aclose()
        assert await reader == []

    with serving(engine, gate) as (served, _):
        run(main(served))


def test_a_choice_can_be_aborted_alone(engine: Engine) -> None:
    wanted = answer(engine, max_tokens=6, ignore_eos=True, seed=2)
    gate = Gate(engine)

    async def main(served: AsyncEngine, listener: Ending) -> None:
        gate.shut()
        stream = await served.generate(PROMPT, params_of(n=2))
        await gate.reached()
        gate.let_pass()
        got = [await anext(stream)]  # choice 0; the first output of choice 1 is in the queue too
        assert got[0].index == 0
        stream.abort(0)
        stream.abort(0)
        gate.open()
        rest = [item async for item in stream]
        assert {item.index for item in rest} == {1}
        assert [t for item in rest for t in item.output.token_ids] == wanted
        assert await listener.next_end() is FinishReason.ABORT
        assert await listener.next_end() is FinishReason.LENGTH

    with serving(engine, gate) as (served, listener):
        run(main(served, listener))


def test_nothing_more_comes_of_an_aborted_choice(engine: Engine) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine) -> None:
        gate.shut()
        stream = await served.generate(PROMPT, params_of(n=2))
        await gate.reached()
        gate.let_pass()
        assert (await anext(stream)).index == 0
        stream.abort(1)  # its first output lies in the queue already
        gate.open()
        assert {item.index async for item in stream} == {0}

    with serving(engine, gate) as (served, _):
        run(main(served))


def test_the_reader_of_an_aborted_submission_is_told(engine: Engine) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine, listener: Ending) -> None:
        gate.shut()
        stream = await served.generate(PROMPT, params_of(50, n=2), request_id="r")
        await gate.reached()
        assert served.abort("r")
        assert not served.abort("another")
        gate.open()
        assert await reasons_of(stream) == dict.fromkeys((0, 1), FinishReason.ABORT)
        assert not served.abort("r")
        assert engine.scheduler.kv_cache.usage == 0

    with serving(engine, gate) as (served, listener):
        run(main(served, listener))


def test_closing_a_finished_stream_spares_a_new_one_of_the_same_name(engine: Engine) -> None:
    """Clients choose request ids; the old stream's end is not the new one's."""

    async def main(served: AsyncEngine, listener: Ending) -> None:
        old = await served.generate(PROMPT, params_of(2), request_id="r")
        assert await listener.next_end() is FinishReason.LENGTH  # and nothing of it is read
        gate.shut()
        new = await served.generate(PROMPT, params_of(4), request_id="r")
        await gate.reached()
        await old.aclose()
        gate.open()
        assert await reasons_of(new) == {0: FinishReason.LENGTH}

    gate = Gate(engine)
    with serving(engine, gate) as (served, listener):
        run(main(served, listener))


# --- submitting ----------------------------------------------------------------------------


def test_a_cancelled_submission_is_taken_back(engine: Engine) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine, listener: Ending) -> None:
        gate.shut()
        first = await served.generate(PROMPT, params_of(2))
        await gate.reached()
        second = asyncio.create_task(served.generate(PROMPT, params_of(50)))
        await asyncio.sleep(0)  # it is in the inbox now, and the engine thread stands still
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.open()
        assert await listener.next_end() is FinishReason.ABORT
        assert await reasons_of(first) == {0: FinishReason.LENGTH}

    with serving(engine, gate) as (served, listener):
        run(main(served, listener))
    assert engine.scheduler.kv_cache.usage == 0
    assert listener.rejected == []


def test_a_name_in_use_is_refused_and_its_owner_spared(engine: Engine) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine, listener: Ending) -> None:
        gate.shut()
        first = await served.generate(PROMPT, params_of(3), request_id="r")
        await gate.reached()
        refused = asyncio.create_task(served.generate(PROMPT, params_of(), request_id="r"))
        cancelled = asyncio.create_task(served.generate(PROMPT, params_of(), request_id="r"))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)  # its abort is in the inbox, behind the submission
        gate.open()
        with pytest.raises(RequestError, match="'r' is already in use"):
            await refused
        assert await reasons_of(first) == {0: FinishReason.LENGTH}
        assert listener.rejected == ["invalid"]

    with serving(engine, gate) as (served, listener):
        run(main(served, listener))


def test_a_full_queue_refuses(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_requests=1, max_queued_requests=1)
    gate = Gate(engine)

    async def main(served: AsyncEngine, listener: Ending) -> None:
        gate.shut()
        running = await served.generate(PROMPT, params_of(3))
        await gate.reached()
        gate.let_pass()  # it is admitted with this step
        await anext(running)
        submissions = [asyncio.create_task(served.generate(PROMPT, params_of(2))) for _ in range(2)]
        await asyncio.sleep(0)
        gate.open()
        waiting = await submissions[0]
        with pytest.raises(QueueFullError, match="queue holds 1 requests; 1 more") as caught:
            await submissions[1]
        assert caught.value.retry_after_s >= 1
        assert listener.rejected == ["queue_full"]
        assert await reasons_of(running) == {0: FinishReason.LENGTH}
        assert await reasons_of(waiting) == {0: FinishReason.LENGTH}

    with serving(engine, gate) as (served, listener):
        run(main(served, listener))


def test_a_bad_request_never_reaches_the_thread(engine: Engine) -> None:
    async def main(served: AsyncEngine, listener: Ending) -> None:
        with pytest.raises(PromptError, match="outside a picture"):
            await served.generate(Prompt((0, 5)), params_of())
        assert listener.rejected == ["invalid"]

    with serving(engine) as (served, listener):
        run(main(served, listener))


# --- the end -------------------------------------------------------------------------------


def test_drain_lets_running_requests_finish(engine: Engine) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine, listener: Ending) -> None:
        gate.shut()
        stream = await served.generate(PROMPT, params_of())
        await gate.reached()
        assert served.is_ready
        draining = asyncio.create_task(served.drain(HANG_S))
        await asyncio.sleep(0)
        assert served.is_draining and served.is_healthy and not served.is_ready
        with pytest.raises(EngineDeadError, match="shutting down"):
            await served.generate(PROMPT, params_of())
        assert not draining.done()
        gate.open()
        await draining
        assert await reasons_of(stream) == {0: FinishReason.LENGTH}
        assert listener.rejected == []

    with serving(engine, gate) as (served, listener):
        run(main(served, listener))


def test_drain_ends_what_does_not_finish_in_time(engine: Engine) -> None:
    """Also what lies in the inbox when the time is up."""
    gate = Gate(engine)

    async def main(served: AsyncEngine) -> None:
        gate.shut()
        running = await served.generate(PROMPT, params_of(50, n=2))
        await gate.reached()
        in_inbox = asyncio.create_task(served.generate(PROMPT, params_of(50)))
        await asyncio.sleep(0)
        await served.drain(0)
        gate.open()
        assert await reasons_of(running) == dict.fromkeys((0, 1), FinishReason.ABORT)
        assert await reasons_of(await in_inbox) == {0: FinishReason.ABORT}

    with serving(engine, gate) as (served, _):
        run(main(served))
    assert engine.scheduler.kv_cache.usage == 0


def test_drain_of_an_idle_engine_returns_at_once(engine: Engine) -> None:
    async def main(served: AsyncEngine) -> None:
        stream = await served.generate(PROMPT, params_of(2))
        await reasons_of(stream)
        await served.drain(HANG_S)
        await served.drain(HANG_S)

    with serving(engine) as (served, _):
        run(main(served))


def test_death_reaches_every_stream(engine: Engine) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine, listener: Ending) -> None:
        gate.shut()
        streams = [await served.generate(PROMPT, params_of(50, n=2))]
        await gate.reached()
        reader = asyncio.create_task(tokens_of(streams[0]))
        in_inbox = asyncio.create_task(served.generate(PROMPT, params_of()))
        await asyncio.sleep(0)

        def broken() -> list[TokenOutput]:
            raise ZeroDivisionError("a bug")

        gate._step = broken
        gate.open()
        for task in (reader, in_inbox):
            with pytest.raises(EngineDeadError, match="the engine died: ZeroDivisionError"):
                await task
        with pytest.raises(EngineDeadError, match="the engine has stopped"):
            await served.generate(PROMPT, params_of())
        assert not served.is_healthy and not served.is_ready
        assert not served.abort(streams[0].request_id)
        await streams[0].aclose()
        await served.drain(HANG_S)
        assert listener.rejected == []  # no fault of the requests

    with serving(engine, gate) as (served, listener):
        run(main(served, listener))


def test_close_ends_running_streams(engine: Engine) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine) -> None:
        gate.shut()
        stream = await served.generate(PROMPT, params_of(50))
        await gate.reached()
        closing = asyncio.create_task(asyncio.to_thread(served.close))
        gate.open()
        with pytest.raises(EngineDeadError, match="stopped"):
            await tokens_of(stream)
        await closing
        with pytest.raises(EngineDeadError, match="stopped"):
            await served.generate(PROMPT, params_of())
        served.close()

    with serving(engine, gate) as (served, _):
        run(main(served))


def test_an_engine_that_was_not_started_is_dead(engine: Engine) -> None:
    served = AsyncEngine(engine)
    assert not served.is_healthy
    with pytest.raises(EngineDeadError, match="stopped"):
        run(served.generate(PROMPT, params_of()))
    served.close()


def test_a_step_that_fails_does_not_end_the_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = engine._runner.execute

    def broken(*args: Any) -> Any:
        monkeypatch.setattr(engine._runner, "execute", execute)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._runner, "execute", broken)

    async def main(served: AsyncEngine) -> None:
        first = await served.generate(PROMPT, params_of())
        items = [item async for item in first]
        assert [item.output.finish_reason for item in items] == [FinishReason.ERROR]
        second = await served.generate(PROMPT, params_of())
        assert await reasons_of(second) == {0: FinishReason.LENGTH}

    with serving(engine) as (served, _):
        run(main(served))


def test_a_stuck_step_is_unhealthy(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine) -> None:
        gate.shut()
        stream = await served.generate(PROMPT, params_of(1))
        await gate.reached()
        assert served.is_healthy
        monkeypatch.setattr(module, "STUCK_STEP_S", 0.0)
        assert not served.is_healthy and not served.is_ready
        gate.open()
        await reasons_of(stream)
        await served.drain(HANG_S)  # until no step runs
        assert served.is_healthy

    with serving(engine, gate) as (served, _):
        run(main(served))


# --- idleness, load and loops --------------------------------------------------------------


class CountingInbox(queue.SimpleQueue[Any]):
    """Counts how often the engine thread comes for a message."""

    def __init__(self) -> None:
        super().__init__()
        self.num_gets = 0

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        assert block and timeout is None, "waits in slices: an idle engine would use the CPU"
        self.num_gets += 1
        return super().get()


def test_an_idle_engine_waits_for_its_inbox(engine: Engine) -> None:
    gate = Gate(engine)
    served = AsyncEngine(engine)
    inbox = served._inbox = CountingInbox()

    async def main() -> None:
        for count in (3, 1, 2):
            stream = await served.generate(PROMPT, params_of(count))
            await reasons_of(stream)

    served.start()
    run(main())
    served.close()
    assert inbox.num_gets == 3 + 1  # three submissions and the stop, nothing in between
    assert gate.num_steps == 3 + 1 + 2
    assert gate.num_empty_steps == 0


def test_snapshot_shows_the_load(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(
        checkpoint_for("4t4i_post"), max_num_requests=2, max_model_len=16, block_size=8
    )
    gate = Gate(engine)

    async def main(served: AsyncEngine) -> None:
        gate.shut()
        stream = await served.generate(PROMPT, params_of(4, n=3))
        await gate.reached()
        assert served.snapshot() == module.EngineSnapshot(0, 3, 0.0)
        gate.let_pass()
        await anext(stream)
        await gate.reached()
        assert served.snapshot() == module.EngineSnapshot(2, 1, 0.5)
        gate.open()
        await reasons_of(stream)

    with serving(engine, gate) as (served, _):
        run(main(served))


def test_two_event_loops_share_one_engine(engine: Engine) -> None:
    wanted = {seed: answer(engine, max_tokens=8, ignore_eos=True, seed=seed) for seed in range(4)}
    got: dict[int, list[int]] = {}
    together = threading.Barrier(2)

    async def main(served: AsyncEngine, seeds: tuple[int, ...]) -> None:
        await asyncio.to_thread(together.wait, HANG_S)
        streams = {seed: await served.generate(PROMPT, params_of(8, seed=seed)) for seed in seeds}
        for seed, stream in streams.items():
            got[seed] = await tokens_of(stream)

    with serving(engine) as (served, _):
        other = threading.Thread(target=lambda: run(main(served, (2, 3))))
        other.start()
        run(main(served, (0, 1)))
        other.join(HANG_S)
    assert got == wanted


def test_a_loop_that_is_gone_takes_nothing_with_it(engine: Engine) -> None:
    gate = Gate(engine)

    async def leave_behind(served: AsyncEngine) -> None:
        gate.shut()
        await served.generate(PROMPT, params_of(50, n=2), request_id="orphan")
        await gate.reached()

    async def stay(served: AsyncEngine, listener: Ending) -> None:
        gate.let_pass()
        await gate.reached()
        assert served.abort("orphan")
        gate.open()
        stream = await served.generate(PROMPT, params_of(3))
        assert await reasons_of(stream) == {0: FinishReason.LENGTH}
        ends = [await listener.next_end() for _ in range(3)]
        assert ends == [FinishReason.ABORT] * 2 + [FinishReason.LENGTH]

    with serving(engine, gate) as (served, listener):
        run(leave_behind(served))
        run(stay(served, listener))
    assert engine.scheduler.kv_cache.usage == 0
