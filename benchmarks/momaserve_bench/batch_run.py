"""One batch through the engine, step by step: when it started to decode, and what its steps did."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from momaserve.engine import Engine
from momaserve.errors import ConfigError, MomaserveError
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.outputs import FinishReason, RequestStats, TokenOutput
from momaserve.request import Submission
from momaserve.stats import StepStats
from momaserve_bench.roof import StepBytes, StepLoad, step_bytes


class EngineFailedError(MomaserveError):
    """The engine could not answer a request of a benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTimes:
    """One batch, from its arrival to its last token.

    It decodes from the step that gave its last row a first token to the one that ended its
    first row: in between every row decodes and nothing else happens.
    """

    latency_s: float
    prefill_s: float
    """Until every row had its first token."""
    decode_s: float
    num_decode_steps: int
    num_decode_tokens: int
    """Tokens sampled while it decoded; those that the grammar forces cost nothing."""


class LoadCounter:
    """Watches the engine while a batch runs and keeps the load of each decoding step.

    A `StatsListener`. Counting costs time, so a run that is counted should not be timed.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._stats: StepStats | None = None
        self.loads: list[StepLoad] = []

    def on_step(self, stats: StepStats) -> None:
        self._stats = stats

    def on_finished(self, stats: RequestStats) -> None:
        pass

    def on_rejected(self, reason: str) -> None:
        pass

    def take(self, rows: Sequence[_Row]) -> None:
        """A step has computed the last token of each of `rows`, which see all of theirs."""
        assert self._stats is not None
        computed: Counter[Modality] = Counter()
        context: Counter[Modality] = Counter()
        for row in rows:
            computed[self._config.modality_of(row.token_ids[-1])] += 1
            context.update(row.num_tokens)
        self.loads.append(
            StepLoad(
                num_tokens=dict(computed),
                context_tokens=dict(context),
                expert_tokens=self._stats.expert_tokens,
                depth_tokens=self._stats.depth_tokens,
            )
        )


@dataclass(slots=True)
class _Row:
    """One request of the batch as far as it has come."""

    config: ModelConfig
    token_ids: list[int]
    num_outputs: int = 0
    num_tokens: Counter[Modality] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.num_tokens.update(map(self.config.modality_of, self.token_ids))

    def take(self, output: TokenOutput) -> None:
        self.num_outputs += 1
        self.token_ids += output.token_ids
        self.num_tokens.update(map(self.config.modality_of, output.token_ids))


def mean_step_bytes(engine: Engine, loads: Sequence[StepLoad]) -> StepBytes:
    """What the steps that were counted must read at least, on average; at least one step."""
    config, policy = engine.model_config, engine.config.routing
    itemsize = engine.dtype.itemsize
    return StepBytes.mean(
        [step_bytes(config, load, itemsize=itemsize, policy=policy) for load in loads]
    )


def run_batch(
    engine: Engine, submissions: Sequence[Submission], counter: LoadCounter | None = None
) -> BatchTimes:
    """Runs requests of equal length that arrive together.

    Args:
        counter: counts the steps that decode; None counts nothing.

    Raises:
        ConfigError: rows ended before the last one started, so that nothing decoded together.
        EngineFailedError: the engine could not compute a request.
    """
    config = engine.model_config
    rows = {s.request_ids[0]: _Row(config, [*s.prompt_token_ids]) for s in submissions}
    engine.listener = counter
    try:
        return _run(engine, submissions, rows, counter)
    except BaseException:  # an interrupt too: the engine may serve another batch
        for name in rows:
            engine.abort(name)
        raise
    finally:
        engine.listener = None


def _run(
    engine: Engine,
    submissions: Sequence[Submission],
    rows: dict[str, _Row],
    counter: LoadCounter | None,
) -> BatchTimes:
    started = time.perf_counter()
    for submission in submissions:
        engine.add(submission)
    prefilled: float | None = None
    decoded: float | None = None
    num_steps = num_tokens = 0
    while engine.has_work:
        outputs = engine.step()
        now = time.perf_counter()
        is_decoding = prefilled is not None and decoded is None and bool(outputs)
        if is_decoding:
            num_steps += 1
            num_tokens += len(outputs)
            if counter is not None:
                counter.take([rows[output.request_id] for output in outputs])
        for output in outputs:
            if output.finish_reason in (FinishReason.ERROR, FinishReason.TIMEOUT):
                raise EngineFailedError(output.error or "a request timed out")
            rows[output.request_id].take(output)
        has_ended = any(output.finish_reason is not None for output in outputs)
        if is_decoding and has_ended:
            decoded = now
        if prefilled is None and has_ended:
            raise ConfigError(
                f"a row of the batch of {len(rows)} ended before all of them decoded: decode more "
                "tokens, or give it a larger --max-num-step-tokens or --kv-cache-bytes"
            )
        if prefilled is None and all(row.num_outputs for row in rows.values()):
            prefilled = now
    finished = time.perf_counter()
    assert prefilled is not None
    assert decoded is not None
    return BatchTimes(
        latency_s=finished - started,
        prefill_s=prefilled - started,
        decode_s=decoded - prefilled,
        num_decode_steps=num_steps,
        num_decode_tokens=num_tokens,
    )
