"""`include_routing`: which experts computed each generated token, as the float64 program has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from momaserve.config import RoutingPolicy
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import (
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    FIRST_CODE,
    NUM_CODES,
    Recorder,
    make_engine,
)
from tests.engine.work import (
    SHAPES,
    Answer,
    Ask,
    ask,
    assert_all_equal,
    cache_of,
    run,
    run_one,
)
from tests.reference.moma_float64 import Decision, forward, load_checkpoint, modality_of

EXPERT_CHOICE = RoutingPolicy.EXPERT_CHOICE
Experts = tuple[tuple[int, ...] | None, ...]


def expected(
    checkpoint: Path, token_ids: Sequence[int], policy: str, num_prompt: int
) -> list[Experts]:
    """Experts by layer of the tokens after the prompt, by the independent program."""
    config, weights = load_checkpoint(checkpoint)
    trace: list[Decision] = []
    forward(config, weights, token_ids, policy, num_prompt, trace=trace)  # type: ignore[arg-type]
    chosen = {
        (decision.router, int(position)): decision.selected[row]
        for decision in trace
        for row, position in enumerate(decision.positions)
    }
    answers: list[Experts] = []
    for position in range(num_prompt, len(token_ids)):
        modality = modality_of(config, token_ids[position])
        (group,) = [g["name"] for g in config["expert_groups"] if modality in g["modalities"]]
        experts: list[tuple[int, ...] | None] = []
        for layer in range(config["num_hidden_layers"]):
            depth = chosen.get((f"model.layers.{layer}.depth_router", position))
            selected = chosen.get((f"model.layers.{layer}.experts.{group}.router", position))
            if depth is not None and not depth[0]:
                experts.append(None)
            elif selected is None:
                experts.append((0,))
            else:
                experts.append(tuple(i for i, used in enumerate(selected) if used))
        answers.append(tuple(experts))
    return answers


def traced(prompt: Sequence[int], **fields: Any) -> Ask:
    return ask(prompt, include_routing=True, **fields)


def experts_of(answer: Answer) -> list[Experts]:
    return [entry.experts for entry in answer.routing]


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("policy", ["causal", "calibrated"])
def test_agrees_with_the_float64_program(
    case: str, policy: str, checkpoint_for: CheckpointFor
) -> None:
    checkpoint = checkpoint_for(case)
    prompt = (BOS, 30, 31, 32)
    asked = traced(
        prompt,
        mode="interleaved",
        logit_bias={BEGIN_IMAGE: 8.0},
        min_tokens=12,
        max_tokens=18,
        routing=policy,
    )
    answer = run_one(make_engine(checkpoint), asked)
    assert len(answer.token_ids) == 18
    assert BEGIN_IMAGE in answer.token_ids and max(answer.token_ids) >= FIRST_CODE
    wanted = expected(checkpoint, [*prompt, *answer.token_ids], policy, len(prompt))
    assert experts_of(answer) == wanted[: len(answer.routing)]
    assert len(answer.token_ids) - len(answer.routing) in (1, 2)
    config, _ = load_checkpoint(checkpoint)
    groups = {m: g["name"] for g in config["expert_groups"] for m in g["modalities"]}
    assert [entry.group for entry in answer.routing] == [
        groups[modality_of(config, token)] for token in answer.token_ids[: len(answer.routing)]
    ]


def test_a_prompt_under_expert_choice_is_not_reported_but_its_answer_is(
    checkpoint_for: CheckpointFor,
) -> None:
    checkpoint = checkpoint_for("4t4i_post")
    prompt = (BOS, *range(30, 41))
    answer = run_one(
        make_engine(checkpoint), traced(prompt, prompt_routing=EXPERT_CHOICE, max_tokens=6)
    )
    wanted = expected(checkpoint, [*prompt, *answer.token_ids], "expert_choice", len(prompt))
    assert experts_of(answer) == wanted[:5]


def test_a_whole_picture_lacks_only_what_was_never_computed(checkpoint_for: CheckpointFor) -> None:
    answer = run_one(make_engine(checkpoint_for("4t4i_post")), traced((BOS, 30, 31), mode="image"))
    assert len(answer.token_ids) == NUM_CODES + 2
    assert answer.token_ids[0] == BEGIN_IMAGE and answer.token_ids[-1] == END_IMAGE
    assert len(answer.routing) == NUM_CODES  # begin_image and all codes but the last
    assert [entry.group for entry in answer.routing] == ["text", *["image"] * (NUM_CODES - 1)]


def test_nothing_is_reported_unasked(checkpoint_for: CheckpointFor) -> None:
    asks = [ask((BOS, 30, 31), max_tokens=5), traced((BOS, 30, 31), max_tokens=5)]
    ((plain,), (with_routing,)) = run(make_engine(checkpoint_for("4t4i_post")), asks)
    assert plain.routing == []
    assert len(with_routing.routing) == 4
    assert plain.token_ids == with_routing.token_ids


@pytest.mark.parametrize("mode", ["text", "image"])
def test_samples_of_one_prompt_share_the_token_that_all_begin_with(
    mode: str, checkpoint_for: CheckpointFor
) -> None:
    asked = traced((BOS, *range(30, 39)), mode=mode, n=3, max_tokens=6 if mode == "text" else None)
    ((*answers,),) = run(make_engine(checkpoint_for("4t4i_post")), [asked])
    for answer in answers:
        wanted = expected(
            checkpoint_for("4t4i_post"), [*asked.prompt, *answer.token_ids], "causal", 10
        )
        assert len(answer.routing) >= 4
        assert experts_of(answer) == wanted[: len(answer.routing)]


def test_a_preempted_answer_reports_each_token_once(checkpoint_for: CheckpointFor) -> None:
    checkpoint = checkpoint_for("4t4i_post")
    asks = [traced((BOS, 30 + i, 31, 32, 33), max_tokens=14) for i in range(4)]
    alone = run(make_engine(checkpoint, max_num_requests=1), asks)
    engine = make_engine(checkpoint, **cache_of(checkpoint, 12))
    engine.listener = recorder = Recorder()
    crowded = run(engine, asks)
    assert sum(step.num_preemptions for step in recorder.steps) > 0
    assert_all_equal(crowded, alone)
    assert all(len(answer.routing) == 13 for (answer,) in crowded)
