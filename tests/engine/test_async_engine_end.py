"""The engine on its thread: draining, death, idleness, load, and several event loops."""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import Any

import pytest

from momaserve import async_engine as module
from momaserve.async_engine import AsyncEngine
from momaserve.engine import Engine
from momaserve.errors import EngineDeadError
from momaserve.outputs import FinishReason, TokenOutput
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import answer, make_engine
from tests.engine.threaded import (
    HANG_S,
    PROMPT,
    Ending,
    Gate,
    params_of,
    reasons_of,
    run,
    serving,
    tokens_of,
)

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
        assert listener.rejected == ["draining"]

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

    def broken(*args: Any, **options: Any) -> Any:
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


def test_a_device_that_is_beyond_use_ends_the_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access on a GPU nothing runs there any more; whoever watches must know."""

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(engine._runner, "execute", broken)
    monkeypatch.setattr(engine._runner, "check_device", broken)

    async def main(served: AsyncEngine) -> None:
        with pytest.raises(EngineDeadError, match="RuntimeError"):
            stream = await served.generate(PROMPT, params_of())
            await tokens_of(stream)
        assert not served.is_healthy

    with serving(engine) as (served, _):
        run(main(served))


def test_a_stuck_step_is_unhealthy_and_shows_its_stack(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine) -> None:
        watchdog = served._watchdog
        assert watchdog is not None
        gate.shut()
        stream = await served.generate(PROMPT, params_of(1))
        await gate.reached()
        assert served.is_healthy
        watchdog.look()
        assert not caplog.records
        monkeypatch.setattr(watchdog, "_limit_s", 0.0)
        assert not served.is_healthy and not served.is_ready
        watchdog.look()
        watchdog.look()
        assert len([r for r in caplog.records if r.levelname == "CRITICAL"]) == 1
        assert "_gated" in capfd.readouterr().err  # where it hangs
        monkeypatch.setattr(watchdog, "_limit_s", 120.0)
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
        assert served.snapshot() == module.EngineSnapshot(2, 1, 0.25)  # one block, which two share
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


def test_an_engine_that_breaks_on_a_submission_tells_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even an error that `add` must not raise reaches who waits, and every later call."""

    def broken(requests: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(engine, "add", broken)

    async def main(served: AsyncEngine) -> None:
        with pytest.raises(EngineDeadError, match="AssertionError"):
            await served.generate(PROMPT, params_of())
        with pytest.raises(EngineDeadError):
            await served.generate(PROMPT, params_of())

    with serving(engine) as (served, _):
        run(main(served))
