"""A request that is preempted answers as if nothing had happened; no two write to one slot."""

from __future__ import annotations

import random
from typing import Any

import pytest

from momaserve.config import RoutingPolicy
from momaserve.core.plan import StepPlan
from momaserve.engine import Engine
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import BOS, Recorder, make_engine
from tests.engine.work import (
    BLOCK_SIZE,
    PROMPT_POLICIES,
    SHAPES,
    WAYS,
    Alone,
    Answer,
    Ask,
    ask,
    assert_all_equal,
    assert_equal,
    cache_of,
    in_turn,
    make_asks,
    name_of,
    run,
)


class Watch(Recorder):
    """A listener that also looks at every plan before it runs."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._limit = engine.config.scheduler.max_num_step_tokens
        self._execute = engine._runner.execute
        self.breaches: list[str] = []
        engine.listener = self
        engine._runner.execute = self._checked  # type: ignore[method-assign]

    @property
    def num_preemptions(self) -> int:
        return sum(step.num_preemptions for step in self.steps)

    def _checked(self, plan: StepPlan, *args: Any, **fields: Any) -> Any:
        self.breaches += breaches(plan, self._limit)
        return self._execute(plan, *args, **fields)


def breaches(plan: StepPlan, limit: int) -> list[str]:
    """What no plan may do."""
    slots = [
        (planned.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE)
        for planned in plan.sequences
        for position in range(planned.start, planned.start + planned.num_new_tokens)
    ]
    targets = [target for _, target in plan.copies]
    claims = {
        "two sequences write to one slot": len(set(slots)) == len(slots),
        "a block is copied to twice": len(set(targets)) == len(targets),
        "a request samples twice": len(set(plan.samples)) == len(plan.samples),
        f"a step of {len(slots)} tokens counts {plan.num_tokens}": len(slots) == plan.num_tokens,
        f"a step of {len(slots)} tokens, at most {limit}": len(slots) <= limit,
    }
    return [claim for claim, holds in claims.items() if not holds]


def tight_engine(
    checkpoint_for: CheckpointFor, case: str, num_blocks: int, **options: Any
) -> tuple[Engine, Watch]:
    """An engine with few blocks, whose plans are checked before they run."""
    checkpoint = checkpoint_for(case)
    engine = make_engine(checkpoint, **cache_of(checkpoint, num_blocks), **options)
    return engine, Watch(engine)


# --- preempted = undisturbed ---------------------------------------------------------------


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("case", SHAPES)
def test_preempted_equals_undisturbed(
    checkpoint_for: CheckpointFor, alone: Alone, case: str, prefix_caching: bool
) -> None:
    """All modes, with guidance, penalties, several samples, and prompts of expert choice."""
    asks = in_turn(
        make_asks(checkpoint_for(case), 10),
        n=[1, 3, 1, 2],
        prompt_routing=PROMPT_POLICIES,
        max_tokens=[16, 24, 12],
    )
    engine, watch = tight_engine(checkpoint_for, case, 16, prefix_caching=prefix_caching)
    assert_all_equal(run(engine, asks), alone(case, asks))
    assert watch.breaches == []
    assert watch.num_preemptions > 5


@pytest.mark.parametrize(("step_tokens", "num_blocks"), [(2, 13), (5, 16), (16, 20)])
def test_preempted_in_chunks(
    checkpoint_for: CheckpointFor, alone: Alone, step_tokens: int, num_blocks: int
) -> None:
    asks = in_turn(make_asks(checkpoint_for("4t4i_post"), 10), n=[2, 1], max_tokens=[16, 24])
    engine, watch = tight_engine(
        checkpoint_for, "4t4i_post", num_blocks, max_num_step_tokens=step_tokens
    )
    assert_all_equal(run(engine, asks, per_step=1), alone("4t4i_post", asks))
    assert watch.breaches == []
    assert watch.num_preemptions > 0


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"guidance_scale": 3.0},
        {"n": 3},
        {"n": 2, "guidance_scale": 3.0, "prompt_routing": RoutingPolicy.EXPERT_CHOICE},
        {"repetition_penalty": 1.7, "frequency_penalty": 0.4, "min_tokens": 4},
        {"prompt_routing": RoutingPolicy.EXPERT_CHOICE},
        {"prompt_logprobs": 1, "n": 2},
    ],
    ids=name_of,
)
def test_each_kind_of_work_is_preempted(
    checkpoint_for: CheckpointFor, alone: Alone, mode: str, fields: dict[str, Any]
) -> None:
    """What the test above mixes, one by one: four prompts on blocks for one and a half."""
    case = "4t4i_post"
    bias = {"logit_bias": {21: 8.0}} if mode == "interleaved" else {}
    ways: dict[str, Any] = {"text": WAYS[1], "image": WAYS[2], **bias}
    asks = [
        ask((BOS, *range(30 + i, 34 + i)), mode=mode, max_tokens=11, seed=10 * i, **ways, **fields)
        for i in range(4)
    ]
    wanted = alone(case, asks)
    guided = fields.get("guidance_scale", 1) != 1
    total = 0
    for num_blocks in (8, 9) if guided else (5, 8):
        engine, watch = tight_engine(checkpoint_for, case, num_blocks)
        assert_all_equal(run(engine, asks), wanted)
        assert watch.breaches == []
        total += watch.num_preemptions
    assert total > 0


@pytest.mark.parametrize("plan_ahead", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_aborts_between_preemptions(
    checkpoint_for: CheckpointFor, alone: Alone, seed: int, plan_ahead: bool
) -> None:
    """Those that are left answer as ever; those that end answered so far as they should."""
    case = SHAPES[3 + seed % 3]
    roll = random.Random(seed)
    asks = in_turn(make_asks(checkpoint_for(case), 12, first=30 + seed), n=[1, 2, 3])
    engine, watch = tight_engine(
        checkpoint_for, case, 15, max_num_step_tokens=64, plan_ahead=plan_ahead
    )
    ended: set[str] = set()

    def abort(_: int) -> None:
        names = list(engine.scheduler.requests)
        if names and roll.random() < 0.25:
            ended.add(roll.choice(names))
            assert engine.abort(max(ended & {*names}))
            engine.scheduler.check()

    answers = run(engine, asks, per_step=2, between=abort)
    assert watch.breaches == []
    assert watch.num_preemptions > 0
    assert len(ended) > 2
    for index, (some, others) in enumerate(zip(answers, alone(case, asks), strict=True)):
        for choice, (got, wanted) in enumerate(zip(some, others, strict=True)):
            name = f"r{index}" if len(some) == 1 else f"r{index}-{choice}"
            if name in ended:
                assert got.token_ids == wanted.token_ids[: len(got.token_ids)]
            else:
                assert_equal(got, wanted)


# --- what a plan may not do ----------------------------------------------------------------


def run_late(
    engine: Engine, early: list[Ask], late: Ask
) -> tuple[list[Answer], list[list[Answer]]]:
    """Answers of `late`, which arrives after a step of the early ones, and of those."""
    *others, own = run(engine, [*early, late], per_step=len(early))
    return own, others


def test_a_sample_that_was_just_forked_is_not_robbed_of_its_companions_blocks(
    checkpoint_for: CheckpointFor, alone: Alone
) -> None:
    """A follower starts in the step that ends its leader's prompt; a younger request that needs
    a block later in that step must not preempt it and write where its companion writes."""
    late = ask((BOS, *range(30, 37)), mode="image", n=3, guidance_scale=3.0)
    early = [ask((BOS, 30, 30), max_tokens=9, priority=1, seed=seed) for seed in (1, 5)]
    engine, watch = tight_engine(checkpoint_for, "4t4i_post", 9, max_num_step_tokens=12)
    own, others = run_late(engine, early, late)
    assert watch.breaches == []
    assert_all_equal([own], alone("4t4i_post", [late]))
    assert_all_equal(others, alone("4t4i_post", early))


@pytest.mark.parametrize("num_words", range(4, 8))
def test_companions_of_forked_samples_count_as_tokens_of_the_step(
    checkpoint_for: CheckpointFor, alone: Alone, num_words: int
) -> None:
    """What is kept for the running requests that come after the leader is not theirs."""
    late = ask((BOS, *[30] * num_words), mode="image", n=3, guidance_scale=2.0)
    early = [ask((BOS, 30), max_tokens=8, priority=1, seed=seed) for seed in (1, 5)]
    engine, watch = tight_engine(checkpoint_for, "4t4i_post", 64, max_num_step_tokens=8)
    own, others = run_late(engine, early, late)
    assert watch.breaches == []
    assert_all_equal([own, *others], alone("4t4i_post", [late, *early]))


def test_a_request_alone_is_never_preempted(checkpoint_for: CheckpointFor, alone: Alone) -> None:
    """Whatever was admitted fits: its prompt, its answer, and the companions of a picture."""
    one = ask((BOS, 30, 31), mode="interleaved", max_tokens=13, guidance_scale=2.0).but(
        logit_bias={21: 9.0}
    )
    engine, watch = tight_engine(checkpoint_for, "4t4i_post", 4 + 2)
    assert_all_equal(run(engine, [one]), alone("4t4i_post", [one]))
    assert watch.breaches == []
    assert watch.num_preemptions == 0
