"""An engine on a small random checkpoint, driven one step at a time, and what it tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from momaserve.engine import Engine
from momaserve.llm import engine_config
from momaserve.loading import load_model_parts
from momaserve.outputs import FinishReason, RequestStats, TokenOutput
from momaserve.sampling import SamplingParams
from momaserve.stats import StepStats
from momaserve.tokens.prompt import Prompt

BOS, PAD, EOS = 0, 1, 2
FIRST_CODE, END_IMAGE, BEGIN_IMAGE = 4, 20, 21
NUM_CODES = 4
"""Tokens per image in `tests.reference.checkpoints.IMAGE`."""
WORDS = [BOS, 30, 31, 32, 33]
"""A prompt of five text tokens."""


class Recorder:
    """A `StatsListener` that keeps everything."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.finished: list[RequestStats] = []
        self.rejected: list[str] = []

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def on_finished(self, stats: RequestStats) -> None:
        self.finished.append(stats)

    def on_rejected(self, reason: str) -> None:
        self.rejected.append(reason)


class Ticks:
    """A clock that is one second later each time it is read."""

    def __init__(self) -> None:
        self.now = -1.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def make_engine(checkpoint: Path, *, clock: Ticks | None = None, **options: Any) -> Engine:
    """`options` are fields of EngineConfig, CacheConfig and SchedulerConfig."""
    config = engine_config({"dtype": "float32", "block_size": 4, **options})
    parts = load_model_parts(checkpoint, config)
    return Engine(parts, config, clock=clock or Ticks())


def submit(
    engine: Engine, name: str, prompt: Sequence[int] = WORDS, **fields: Any
) -> SamplingParams:
    """Queue a prompt of token ids; `fields` are those of SamplingParams."""
    params = SamplingParams(**{"seed": 1, **fields})
    engine.add(engine.make_submission(Prompt(tuple(prompt)), params, name))
    return params


def run_until_idle(engine: Engine) -> list[TokenOutput]:
    """All outputs until nothing is left to do; checks every block on the way."""
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += engine.step()
        engine.scheduler.check()
    assert engine.scheduler.kv_cache.usage == 0
    return outputs


def tokens_of(outputs: Sequence[TokenOutput], name: str) -> list[int]:
    return [token for o in outputs if o.request_id == name for token in o.token_ids]


def reason_of(outputs: Sequence[TokenOutput], name: str) -> FinishReason:
    """Why a request ended; it must have been told exactly once, on its last output."""
    mine = [o for o in outputs if o.request_id == name]
    assert [o for o in mine if o.finish_reason is not None] == mine[-1:]
    reason = mine[-1].finish_reason
    assert reason is not None
    return reason


def answer(engine: Engine, prompt: Sequence[int] = WORDS, **fields: Any) -> list[int]:
    """The tokens of one request that runs alone."""
    submit(engine, "alone", prompt, **fields)
    return tokens_of(run_until_idle(engine), "alone")
