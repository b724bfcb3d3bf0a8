"""The engine on its thread: streams, their aborts, and how requests are submitted."""

from __future__ import annotations

import asyncio

import pytest

from momaserve.async_engine import AsyncEngine
from momaserve.engine import Engine
from momaserve.errors import PromptError, QueueFullError, RequestError
from momaserve.outputs import FinishReason
from momaserve.tokens.prompt import Prompt
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

# --- streams -------------------------------------------------------------------------------


def test_a_stream_brings_what_the_engine_makes(engine: Engine) -> None:
    wanted = answer(engine, max_tokens=6, ignore_eos=True)

    async def main(served: AsyncEngine) -> None:
        stream = await served.generate(PROMPT, params_of())
        items = [item async for item in stream]
        assert [t for item in items for t in item.output.token_ids] == wanted
        reasons = [item.output.finish_reason for item in items]
        assert reasons == [None] * (len(items) - 1) + [FinishReason.LENGTH]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    with serving(engine) as (served, _):
        run(main(served))


def test_a_reader_that_keeps_up_gets_each_token(engine: Engine) -> None:
    gate = Gate(engine)

    async def main(served: AsyncEngine) -> None:
        gate.shut()
        stream = await served.generate(PROMPT, params_of())
        for _ in range(6):
            await gate.reached()
            gate.let_pass()
            assert len((await anext(stream)).output.token_ids) == 1

    with serving(engine, gate) as (served, _):
        run(main(served))


def test_a_reader_that_fell_behind_catches_up(engine: Engine) -> None:
    wanted = [answer(engine, max_tokens=6, ignore_eos=True, seed=seed) for seed in (7, 8)]

    async def main(served: AsyncEngine) -> None:
        stream = await served.generate(PROMPT, params_of(seed=7, n=2, logprobs=1))
        await served.drain(HANG_S)
        items = [item async for item in stream]
        assert [item.index for item in items] == [0, 1]
        assert [list(item.output.token_ids) for item in items] == wanted
        for item in items:
            assert item.output.logprobs is not None and len(item.output.logprobs) == 6
            assert item.output.finish_reason is FinishReason.LENGTH

    with serving(engine) as (served, _):
        run(main(served))


def test_choices_of_one_stream_are_told_apart(engine: Engine) -> None:
    wanted = [answer(engine, max_tokens=5, ignore_eos=True, seed=seed) for seed in (7, 8, 9)]

    async def main(served: AsyncEngine) -> None:
        stream = await served.generate(PROMPT, params_of(5, seed=7, n=3), request_id="r")
        assert stream.request_id == "r"
        assert len(set(stream.choice_ids)) == 3
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
        assert await listener.next_end() is FinishReason.LENGTH
        assert await asyncio.to_thread(served._idle.wait, HANG_S)  # and nothing of it is read
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
        with pytest.raises(RequestError, match="'r' is already in use"):
            await served.generate(PROMPT, params_of(), request_id="r")
        gate.open()
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
