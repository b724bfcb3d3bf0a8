"""Requests of every kind, and what each of them answers alone: what equality tests compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from momaserve.config import RoutingPolicy
from momaserve.engine import Engine
from momaserve.models.config import ModelConfig
from momaserve.outputs import FinishReason, TokenLogprob, TokenOutput, TokenRouting
from momaserve.runner.kv_storage import KVLayout, block_bytes
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve.tokens.prompt import Prompt
from tests.engine.driver import BEGIN_IMAGE, BOS, END_IMAGE, make_engine
from tests.reference.checkpoints import sample_ids
from tests.reference.moma_float64 import load_checkpoint

SHAPES = ["dense_post", "moe_8x_pre", "1t1i_post", "4t4i_post", "gqa_pre", "depth_4t4i_post"]
BLOCK_SIZE = 4
TOLERANCE = 2e-4
"""Of log-probabilities that different batches compute; tokens are equal."""
GREEDY = Distribution(temperature=0)
PICTURE = (BEGIN_IMAGE, 5, 9, 4, 17, END_IMAGE)
WAYS = (
    GREEDY,
    Distribution(temperature=0.8),
    Distribution(temperature=1.2, top_k=5),
    Distribution(temperature=1.0, top_p=0.7),
    Distribution(temperature=1.0, top_k=9, top_p=0.9, min_p=0.05),
)
MODES = tuple(OutputMode)


@dataclass(frozen=True, slots=True)
class Ask:
    """One submission."""

    prompt: tuple[int, ...]
    params: SamplingParams

    def but(self, **changes: Any) -> Ask:
        return Ask(self.prompt, replace(self.params, **changes))


@dataclass(slots=True)
class Answer:
    """Everything that one choice was given out, joined."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] | None = None
    routing: list[TokenRouting] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    num_outputs: int = 0

    def take(self, output: TokenOutput) -> None:
        assert self.finish_reason is None, "an output after the last one"
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            assert [entry.token_id for entry in output.logprobs] == list(output.token_ids)
            self.logprobs += output.logprobs
        self.routing += output.routing
        routed = [entry.token_id for entry in self.routing]
        assert routed == self.token_ids[: len(routed)]
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "prompt log-probabilities come twice"
            self.prompt_logprobs = list(output.prompt_logprobs)
        if output.finish_reason not in (FinishReason.ERROR, FinishReason.TIMEOUT):
            assert output.num_cached_tokens == self.num_cached_tokens or not self.num_outputs
            self.num_cached_tokens = output.num_cached_tokens
        self.finish_reason = output.finish_reason
        self.num_outputs += 1


def ask(prompt: Iterable[int], **fields: Any) -> Ask:
    """Greedy in words and pictures, and not ended by eos, unless `fields` say otherwise."""
    defaults = {"text": GREEDY, "image": GREEDY, "seed": 1, "ignore_eos": True, "logprobs": 0}
    return Ask(tuple(prompt), SamplingParams(**{**defaults, **fields}))


def make_asks(checkpoint: Path, count: int, *, first: int = 0) -> list[Ask]:
    """Prompts of words, pictures, both, and a picture begun, each asked in every mode.

    Among them are all ways to draw, guidance, penalties, `min_tokens` and log-probabilities.
    """
    config, _ = load_checkpoint(checkpoint)
    asks: list[Ask] = []
    for index in range(first, first + count):
        words = sample_ids(config, index, pictures=0, words=2 + index % 6)
        prompts = (
            words,
            [BOS, *PICTURE],
            sample_ids(config, index, pictures=1 + index % 2, words=1 + index % 5),
            [*words, *PICTURE[: 2 + index % 3]],
        )
        mode = MODES[(index // 4 + index) % 3]
        is_guided = index % 5 in (1, 2)
        is_penalised = index % 4 in (1, 2)
        params = SamplingParams(
            mode=mode,
            max_tokens=6 + (5 * index) % 11,
            seed=1000 + index,
            text=WAYS[(index + index // 5) % len(WAYS)],
            image=WAYS[(index + 1) % len(WAYS)],
            ignore_eos=index % 2 == 0,
            logprobs=(None, 0, 2)[index % 3],
            logit_bias={BEGIN_IMAGE: 6.0} if mode is OutputMode.INTERLEAVED else {},
            guidance_scale=2.5 if is_guided else 1.0,
            repetition_penalty=1.4 if is_penalised else 1.0,
            presence_penalty=0.5 if is_penalised else 0.0,
            frequency_penalty=-0.7 if is_penalised else 0.0,
            min_tokens=index % 3,
            include_routing=index % 4 == 3,
        )
        asks.append(Ask(tuple(prompts[index % 4]), params))
    return asks


def name_of(fields: Mapping[str, Any]) -> str:
    """Names a parameter of a test."""
    return "-".join(fields) or "plain"


def unguided(asks: Iterable[Ask]) -> list[Ask]:
    """Those that run in steps of one token too."""
    return [a for a in asks if a.params.guidance_scale == 1]


def in_turn(asks: Sequence[Ask], **fields: Sequence[Any]) -> list[Ask]:
    """The same with each field's values in turn."""
    return [
        a.but(**{name: values[index % len(values)] for name, values in fields.items()})
        for index, a in enumerate(asks)
    ]


PROMPT_POLICIES = [None, RoutingPolicy.EXPERT_CHOICE, RoutingPolicy.CALIBRATED]


def run(
    engine: Engine,
    asks: Sequence[Ask],
    *,
    per_step: int | None = None,
    between: Callable[[int], None] | None = None,
) -> list[list[Answer]]:
    """All answers to each; checks every block after every step.

    Args:
        per_step: submissions that arrive before each step; None is all at once.
        between: is called with the number of steps so far, after each.
    """
    answers: dict[str, Answer] = {}
    names: list[list[str]] = []
    waiting = list(enumerate(asks))
    num_steps = 0
    while waiting or engine.has_work:
        count = len(waiting) if per_step is None else per_step
        for index, one in waiting[:count]:
            submission = engine.make_submission(Prompt(one.prompt), one.params, f"r{index}")
            engine.add(submission)
            names.append(list(submission.request_ids))
            answers |= {name: Answer() for name in submission.request_ids}
        del waiting[:count]
        for output in engine.step():
            answers[output.request_id].take(output)
        engine.scheduler.check()
        num_steps += 1
        if between is not None:
            between(num_steps)
    assert engine.scheduler.kv_cache.usage == 0
    return [[answers[name] for name in group] for group in names]


def run_one(engine: Engine, one: Ask) -> Answer:
    ((answer,),) = run(engine, [one])
    return answer


def values_of(entries: Sequence[TokenLogprob] | None) -> list[float]:
    return [entry.logprob for entry in entries or ()]


def assert_equal(got: Answer, wanted: Answer) -> None:
    assert got.token_ids == wanted.token_ids
    assert got.finish_reason is wanted.finish_reason
    assert values_of(got.logprobs) == pytest.approx(values_of(wanted.logprobs), abs=TOLERANCE)
    assert got.routing == wanted.routing
    assert (got.prompt_logprobs is None) == (wanted.prompt_logprobs is None)
    assert values_of(got.prompt_logprobs) == pytest.approx(
        values_of(wanted.prompt_logprobs), abs=TOLERANCE
    )


def assert_all_equal(got: Sequence[Sequence[Answer]], wanted: Sequence[Sequence[Answer]]) -> None:
    assert len(got) == len(wanted)
    for some, others in zip(got, wanted, strict=True):
        assert len(some) == len(others)
        for one, other in zip(some, others, strict=True):
            assert_equal(one, other)


class Alone:
    """What requests answer when each has an engine without a prefix cache to itself."""

    def __init__(self, checkpoint_for: Callable[[str], Path]) -> None:
        self._checkpoint_for = checkpoint_for
        self._engines: dict[str, Engine] = {}
        self._answers: dict[str, list[Answer]] = {}

    def __call__(self, case: str, asks: Iterable[Ask]) -> list[list[Answer]]:
        return [self._one(case, one) for one in asks]

    def _one(self, case: str, one: Ask) -> list[Answer]:
        """A choice of several is a request of its own with the seed that it is promised."""
        key = f"{case} {one!r}"
        if key not in self._answers:
            if case not in self._engines:
                checkpoint = self._checkpoint_for(case)
                self._engines[case] = make_engine(
                    checkpoint, prefix_caching=False, plan_ahead=False, max_num_requests=2
                )
            seed = one.params.seed
            assert seed is not None
            singles = [one.but(n=1, seed=seed + index) for index in range(one.params.n)]
            self._answers[key] = [run_one(self._engines[case], single) for single in singles]
        return self._answers[key]


def cache_of(checkpoint: Path, num_blocks: int) -> dict[str, Any]:
    """The option that gives an engine the memory of so many blocks of tokens, with two thirds
    of what depth-routed layers may keep of them."""
    config = ModelConfig.from_dict(load_checkpoint(checkpoint)[0])
    most = KVLayout.of(config, BLOCK_SIZE).blocks_for(num_blocks * BLOCK_SIZE)
    num_blocks += (most - num_blocks) * 2 // 3
    return {"kv_cache_bytes": num_blocks * block_bytes(config, BLOCK_SIZE, torch.float32)}
