"""Made-up requests in front of the first real ones.

Kernels are compiled, or read from a cache on disk, when they are called first, and a GPU's decoding
steps are captured when their shape comes first; that takes seconds, which nobody should wait for in
an answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice

from momaserve.engine import Engine
from momaserve.errors import RequestError, WarmUpError
from momaserve.modality import Modality
from momaserve.models.random_weights import ordinary_token_ids
from momaserve.outputs import FinishReason, RequestStats
from momaserve.runner.gpu_buckets import rows_bucket
from momaserve.sampling import SamplingParams
from momaserve.stats import StepStats
from momaserve.step_timer import StepTimer
from momaserve.tokens.prompt import Prompt

NUM_DECODED = 3
"""Tokens of each request: its prompt's last row, a decoding step, and one on top of it."""
_PROMPT_TOKENS = 32
_SEVERAL = 8
_GPU_PROMPTS = (16, 64, 512)
"""Lengths of prompts whose kernels are cut differently."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What was done."""

    batch_sizes: tuple[int, ...]
    seconds: float


def warm_up(engine: Engine) -> WarmUp:
    """Runs batches of made-up requests, words beside pictures, of all sizes that decode alike.

    Neither statistics nor the cost model hear of them, and they leave nothing in the prefix cache.

    Raises:
        WarmUpError: a step failed.
    """
    if engine.has_work:
        raise ValueError("the engine has requests of its own")
    started = time.monotonic()
    sizes = tuple(_batch_sizes(engine))
    with _unheard(engine):
        for size in sizes:
            _run(engine, size, _PROMPT_TOKENS)
        for length in _GPU_PROMPTS if engine.backend_name == "triton" else ():
            _run(engine, 1, length)
    return WarmUp(sizes, time.monotonic() - started)


def _batch_sizes(engine: Engine) -> Iterator[int]:
    """Of a GPU's captured steps the largest that share one; elsewhere few rows and several."""
    limits = engine.config.scheduler
    most = min(limits.max_num_requests, limits.max_queued_requests, limits.max_queued_tokens)
    if engine.backend_name != "triton":
        yield from sorted({1, min(_SEVERAL, most)})
        return
    for size in range(1, most + 1):
        if size == most or rows_bucket(size) != rows_bucket(size + 1):
            yield size


@contextmanager
def _unheard(engine: Engine) -> Iterator[None]:
    timer, listener = engine.step_timer, engine.listener
    engine.step_timer, engine.listener = StepTimer(None), _Deaf()
    try:
        yield
    finally:
        engine.step_timer, engine.listener = timer, listener
        engine.scheduler.kv_cache.forget_all()


class _Deaf:
    """A `StatsListener`: with one, an engine counts what its routers choose."""

    def on_step(self, stats: StepStats) -> None:
        pass

    def on_finished(self, stats: RequestStats) -> None:
        pass

    def on_rejected(self, reason: str) -> None:
        pass


def _run(engine: Engine, size: int, prompt_tokens: int) -> None:
    """Decodes a few tokens of `size` requests at the same time, then aborts them."""
    limits = engine.config.scheduler
    room = min(limits.max_queued_tokens, limits.max_num_step_tokens)  # all begin in one step
    prompt_tokens = max(1, min(prompt_tokens, room // size))
    names = [f"warm-up-{size}-{number}" for number in range(size)]
    num_tokens = dict.fromkeys(names, 0)
    for number, name in enumerate(names):
        _add(engine, name, prompt_tokens, draws=number % 2 == 1)
    try:
        _decode(engine, num_tokens)
    except WarmUpError:
        _end(engine, names)
        raise
    except Exception as error:  # a device that is beyond use: no step would end any more
        reason = f"{type(error).__name__}: {error}"
        raise WarmUpError(f"a first step of {size} requests failed: {reason}") from error
    _end(engine, names)


def _decode(engine: Engine, num_tokens: dict[str, int]) -> None:
    while engine.has_work and min(num_tokens.values()) < NUM_DECODED:
        for output in engine.step():
            if output.finish_reason is FinishReason.ERROR:
                count = len(num_tokens)
                raise WarmUpError(f"a first step of {count} requests failed: {output.error}")
            num_tokens[output.request_id] += len(output.token_ids)


def _end(engine: Engine, names: Sequence[str]) -> None:
    for name in names:
        engine.abort(name)
    while engine.has_work:  # a step may be in flight
        engine.step()


def _add(engine: Engine, name: str, prompt_tokens: int, *, draws: bool) -> None:
    """Queues a request, of words where a picture is not to be had, or none where neither is."""
    config, image = engine.model_config, engine.model_config.image
    words = ordinary_token_ids(config, Modality.TEXT).tolist()
    room = max(1, min(prompt_tokens, engine.max_model_len - NUM_DECODED))
    with suppress(RequestError):  # the cache is too small for any
        if draws and image is not None and prompt_tokens > 1:
            _submit(engine, name, [config.bos_token_id, image.begin_token_id], None)
            return
    with suppress(RequestError):
        _submit(engine, name, [config.bos_token_id, *islice(cycle(words), room - 1)], NUM_DECODED)


def _submit(engine: Engine, name: str, token_ids: list[int], max_tokens: int | None) -> None:
    defaults = engine.defaults
    params = SamplingParams(
        max_tokens=max_tokens,
        text=defaults.text,
        image=defaults.image,
        ignore_eos=True,
        seed=0,
        cache_salt="warm-up",
    )
    engine.add(engine.make_submission(Prompt(tuple(token_ids)), params, name))
