"""The engine on its own thread, for servers: submit from an event loop, iterate over outputs.

Only the engine thread touches scheduler, cache and device. What crosses to it, and back, are
immutable messages made of plain values. An idle engine blocks on its inbox and uses no CPU.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from momaserve.engine import Engine
from momaserve.errors import (
    DrainingError,
    EngineDeadError,
    MomaserveError,
    QueueFullError,
    RequestError,
)
from momaserve.outputs import FinishReason, TokenOutput
from momaserve.request import Submission
from momaserve.sampling import SamplingParams
from momaserve.stats import StatsListener
from momaserve.tokens.prompt import Prompt
from momaserve.watchdog import Watchdog

logger = logging.getLogger(__name__)

STUCK_STEP_S = 120.0
"""A step that runs longer than this makes the engine unhealthy."""
_DRAINING = "the server is shutting down and takes no new requests"


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """New tokens of one of a submission's n choices, perhaps of several steps."""

    index: int
    output: TokenOutput


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine's load between two steps."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float


@dataclass(frozen=True, slots=True)
class _Abort:
    request_ids: tuple[str, ...]
    reason: FinishReason = FinishReason.ABORT


@dataclass(frozen=True, slots=True)
class _AbortAll:
    """Ends every request, those whose submissions lie before it in the inbox included."""


_Message = Submission | _Abort | _AbortAll


@dataclass(frozen=True, slots=True)
class _Stop:
    """Ends the engine thread."""


class GenerationStream(AsyncIterator[ChoiceOutput]):
    """Outputs of one submission, those of a choice in the order made. Closing it aborts what
    still runs.

    A reader that falls behind gets what a choice has brought meanwhile as one output, so it catches
    up instead of falling further behind. Lives on one event loop; the engine thread only
    schedules callbacks onto that loop.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        request_id: str,
        choice_ids: tuple[str, ...],
        tokens_at_once: int,
    ) -> None:
        self.request_id = request_id
        self.choice_ids = choice_ids
        """Ids of the choices inside the engine."""
        self._engine = engine
        self._index = {choice_id: index for index, choice_id in enumerate(choice_ids)}
        self._open = set(choice_ids)
        self._loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[None] = self._loop.create_future()
        self._unread: dict[str, list[TokenOutput]] = {}
        """By choice; whose reader has waited longest comes first."""
        self._error: MomaserveError | None = None
        """Comes after what is unread."""
        self._news = asyncio.Event()
        """There is something unread, an error, or nothing left to wait for."""
        self._tokens_at_once = tokens_at_once
        self._held: dict[str, list[TokenOutput]] = {}
        """What the engine thread, which alone uses it, has not given out yet."""

    def __aiter__(self) -> GenerationStream:
        return self

    async def __anext__(self) -> ChoiceOutput:
        """Raises EngineDeadError when the engine stops underneath."""
        while self._open:
            if self._unread:
                name = next(iter(self._unread))
                output = TokenOutput.joined(self._unread.pop(name))
                if output.finish_reason is not None:
                    self._open.discard(name)
                return ChoiceOutput(self._index[name], output)
            if self._error is not None:
                self._open.clear()
                raise self._error
            self._news.clear()
            await self._news.wait()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Abort the choices that are not finished; safe to call more than once."""
        self.abort()

    def abort(self, index: int | None = None, reason: FinishReason = FinishReason.ABORT) -> None:
        """End all choices, or one of them: its blocks are free by the next step.

        Args:
            reason: what the statistics say; STOP when the reader found a stop string.
        """
        wanted = self.choice_ids if index is None else (self.choice_ids[index],)
        running = tuple(choice_id for choice_id in wanted if choice_id in self._open)
        self._open.difference_update(running)
        for choice_id in running:
            self._unread.pop(choice_id, None)
        if running:
            self._engine._end_choices(running, reason)
        if not self._open:
            self._news.set()

    # Called on the engine thread.

    def _hold(self, output: TokenOutput) -> TokenOutput | None:
        """What is to be given out now that `output` is there; the first one always is."""
        name = output.request_id
        held = self._held.get(name)
        if held is None:
            self._held[name] = []
            return output
        held.append(output)
        num_tokens = sum(len(each.token_ids) for each in held)
        if output.finish_reason is None and num_tokens < self._tokens_at_once:
            return None
        self._held[name] = []
        return TokenOutput.joined(held)

    # Called through `loop.call_soon_threadsafe`.

    def _accept(self, error: MomaserveError | None) -> None:
        if self._accepted.done():
            return
        if error is None:
            self._accepted.set_result(None)
        else:
            self._open.clear()
            self._accepted.set_exception(error)

    def _put(self, output: TokenOutput) -> None:
        if output.request_id in self._open:
            self._unread.setdefault(output.request_id, []).append(output)
            self._news.set()

    def _break(self, error: MomaserveError) -> None:
        self._accept(error)
        self._error = error
        self._news.set()


class AsyncEngine:
    """Runs an `Engine` on a thread of its own.

    Invariants:
      * every accepted submission ends with a finishing output per choice, or with an error;
      * after the thread has ended, for whatever reason, every call raises EngineDeadError.
    """

    def __init__(self, engine: Engine, *, listener: StatsListener | None = None) -> None:
        self.engine = engine
        self.listener = listener
        engine.listener = listener
        self._inbox: queue.SimpleQueue[_Message | _Stop] = queue.SimpleQueue()
        self._streams: dict[str, GenerationStream] = {}
        """By choice id; whoever changes it holds the lock."""
        self._thread: threading.Thread | None = None
        self._watchdog: Watchdog | None = None
        self._is_dead = False
        self._is_draining = False
        self._idle = threading.Event()
        self._idle.set()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start the engine thread; the engine is ready when this returns."""
        self._watchdog = Watchdog(STUCK_STEP_S)
        self._thread = threading.Thread(target=self._run, name="momaserve-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        tokens_at_once: int = 1,
    ) -> GenerationStream:
        """Submit a prompt; returns once it is queued.

        Args:
            request_id: what `abort` calls it; two that run must not have the same. None makes
                one up.
            tokens_at_once: how many tokens of a choice its outputs have at least, but for the
                first and the last. Handing over each of them takes time from the engine.

        Raises:
            RequestError: the request can never be served, or its id is in use.
            QueueFullError: too much is waiting already.
            DrainingError: the engine takes nothing new.
            EngineDeadError: the engine stopped.
        """
        # Inside the engine it has another one, which was never used and cannot be guessed.
        own_id = uuid.uuid4().hex
        try:
            self._require_alive()
            submission = self.engine.make_submission(prompt, params, own_id)
            stream = GenerationStream(
                self, request_id or own_id, submission.request_ids, tokens_at_once
            )
            self._register(stream)
            try:
                self._post(submission)
                await asyncio.shield(stream._accepted)
            except BaseException as error:
                self._unregister(stream.choice_ids)
                if isinstance(error, asyncio.CancelledError):
                    self._post(_Abort(stream.choice_ids))
                raise
        except QueueFullError:
            self._reject("queue_full")
            raise
        except RequestError:
            self._reject("invalid")
            raise
        except DrainingError:
            self._reject("draining")
            raise
        return stream

    def _register(self, stream: GenerationStream) -> None:
        with self._lock:
            if any(other.request_id == stream.request_id for other in self._streams.values()):
                raise RequestError(
                    f"request id {stream.request_id!r} is already in use", param="request_id"
                )
            self._streams |= dict.fromkeys(stream.choice_ids, stream)

    def _unregister(self, choice_ids: tuple[str, ...]) -> None:
        with self._lock:
            for choice_id in choice_ids:
                self._streams.pop(choice_id, None)

    def _end_choices(self, choice_ids: tuple[str, ...], reason: FinishReason) -> None:
        """End choices that their reader no longer listens to."""
        self._unregister(choice_ids)
        self._post(_Abort(choice_ids, reason))

    def _reject(self, reason: str) -> None:
        if self.listener is not None:
            self.listener.on_rejected(reason)

    def abort(self, request_id: str) -> bool:
        """Abort a submission by its id: its stream ends with finish reason ABORT.

        Returns:
            False when nothing of it is running or waiting.
        """
        with self._lock:
            choice_ids = tuple(c for c, s in self._streams.items() if s.request_id == request_id)
        if choice_ids:
            self._post(_Abort(choice_ids))
        return bool(choice_ids)

    def snapshot(self) -> EngineSnapshot:
        """The load as it stands; numbers may be one step old."""
        scheduler = self.engine.scheduler
        return EngineSnapshot(
            scheduler.num_running, scheduler.num_waiting, scheduler.kv_cache.usage
        )

    @property
    def is_healthy(self) -> bool:
        """Whether the engine makes progress: its thread lives and no step is stuck."""
        if self._thread is None or self._is_dead or self._watchdog is None:
            return False
        return not self._watchdog.is_stuck

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return self._idle.is_set()

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self.is_healthy and not self._is_draining

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests; wait for the running ones, then abort what is left."""
        with self._lock:
            self._is_draining = True
        deadline = time.monotonic() + timeout_s
        while not self._is_dead and not self._idle.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                break
            await asyncio.to_thread(self._idle.wait, min(left, 1.0))
        self._post(_AbortAll())

    def close(self) -> None:
        """Stop the engine thread and wait for it."""
        if self._thread is not None and self._thread.is_alive():
            self._inbox.put(_Stop())
            self._thread.join()
        if self._watchdog is not None:
            self._watchdog.close()
        self._is_dead = True

    def _require_alive(self) -> None:
        if self._is_draining:
            raise DrainingError(_DRAINING)
        if self._thread is None or self._is_dead:
            raise EngineDeadError("the engine has stopped")

    def _post(self, message: _Message) -> None:
        """Hand a message to the engine thread."""
        with self._lock:
            if isinstance(message, Submission) and self._is_draining:
                raise DrainingError(_DRAINING)
            # A message posted after the thread ended would never be answered.
            if self._is_dead:
                if isinstance(message, Submission):
                    raise EngineDeadError("the engine has stopped")
                return
            self._idle.clear()
            self._inbox.put(message)

    # --- engine thread -----------------------------------------------------------------------

    def _run(self) -> None:
        error = EngineDeadError("the engine was stopped")
        try:
            self._loop()
        except Exception as cause:  # loud, and the end of this engine
            logger.exception("the engine thread died")
            error = EngineDeadError(f"the engine died: {type(cause).__name__}")
        finally:
            with self._lock:
                self._is_dead = True
                self._idle.set()
                streams = set(self._streams.values())
                self._streams.clear()
            for stream in streams:
                _call(stream, lambda s=stream: s._break(error))  # type: ignore[misc]

    def _loop(self) -> None:
        watchdog = self._watchdog
        assert watchdog is not None
        while True:
            while not self.engine.has_work or not self._inbox.empty():
                if not self.engine.has_work and self._inbox.empty():
                    with self._lock:
                        if self._inbox.empty():
                            self._idle.set()
                message = self._inbox.get()
                if isinstance(message, _Stop):
                    return
                self._handle(message)
            watchdog.step_starts()
            outputs = self.engine.step()
            watchdog.step_ends()
            self._deliver(outputs)

    def _handle(self, message: _Message) -> None:
        if isinstance(message, Submission):
            self._take(message)
        elif isinstance(message, _Abort):
            self._abort(message.request_ids, message.reason)
        else:
            with self._lock:
                everyone = tuple(self._streams)
            self._abort(everyone, FinishReason.ABORT)

    def _take(self, submission: Submission) -> None:
        error: MomaserveError | None = None
        try:
            self.engine.add(submission)
        except MomaserveError as refused:
            error = refused
        with self._lock:
            stream = self._streams.get(submission.request_ids[0])
        if stream is not None:
            _call(stream, lambda: stream._accept(error))

    def _abort(self, request_ids: tuple[str, ...], reason: FinishReason) -> None:
        """End choices that run. Whoever closed its stream no longer listens; others are told."""
        outputs: list[TokenOutput] = []
        for request_id in request_ids:
            stats = self.engine.abort(request_id, reason)
            if stats is not None:
                outputs.append(
                    TokenOutput(
                        request_id=request_id, token_ids=(), finish_reason=reason, stats=stats
                    )
                )
        self._deliver(outputs)

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """Hand a step's outputs over, with one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[GenerationStream, TokenOutput]]] = {}
        with self._lock:
            for output in outputs:
                stream = self._streams.get(output.request_id)
                if stream is None:
                    continue
                if output.finish_reason is not None:
                    del self._streams[output.request_id]
                ready = stream._hold(output)
                if ready is not None:
                    by_loop.setdefault(stream._loop, []).append((stream, ready))
        for pairs in by_loop.values():
            _call(pairs[0][0], lambda pairs=pairs: _put_all(pairs))  # type: ignore[misc]


def _put_all(pairs: list[tuple[GenerationStream, TokenOutput]]) -> None:
    for stream, output in pairs:
        stream._put(output)


def _call(stream: GenerationStream, function: Callable[[], None]) -> None:
    """Run `function` on the stream's loop; a loop that is gone has nobody waiting."""
    try:
        stream._loop.call_soon_threadsafe(function)
    except RuntimeError:
        logger.debug("the event loop of request %s is closed", stream.request_id)
