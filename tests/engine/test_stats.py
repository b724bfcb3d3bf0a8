"""What a listener is told, exactly: the clock is one second later each time it is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.engine import Engine
from momaserve.outputs import FinishReason, RequestStats
from momaserve.sampling import Distribution, OutputMode
from momaserve.stats import StepStats
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import (
    BEGIN_IMAGE,
    FIRST_CODE,
    NUM_CODES,
    WORDS,
    Recorder,
    make_engine,
    run_until_idle,
    submit,
)
from tests.models.factory import forward

TALKS: dict[str, Any] = {"text": Distribution(temperature=0), "ignore_eos": True}
PICTURE = [BEGIN_IMAGE, *range(FIRST_CODE, FIRST_CODE + NUM_CODES), 20]


def listened(
    checkpoint_for: CheckpointFor, case: str = "4t4i_post", **options: Any
) -> tuple[Engine, Recorder]:
    """An engine whose cache has 8 blocks of 4 tokens, and its listener."""
    fields = {"max_model_len": 16, "max_num_requests": 2, **options}
    engine = make_engine(checkpoint_for(case), **fields)
    engine.listener = recorder = Recorder()
    return engine, recorder


def totals(steps: list[StepStats]) -> dict[str, int]:
    names = ("prompt_tokens", "generated_text_tokens", "generated_image_tokens", "images")
    return {name: sum(getattr(step, name) for step in steps) for name in names}


def test_a_text_request(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for)
    submit(engine, "r", max_tokens=3, **TALKS)  # arrives at 0
    run_until_idle(engine)  # steps from 1 to 2, 3 to 4 and 5 to 6; it is over at 7
    assert recorder.finished == [
        RequestStats(
            finish_reason=FinishReason.LENGTH,
            num_prompt_tokens=5,
            num_generated_tokens=3,
            queue_s=1.0,
            prefill_s=1.0,
            decode_s=4.0,
            e2e_s=7.0,
            time_per_output_token_s=2.0,
        )
    ]
    first, second, third = recorder.steps
    assert [step.step_s for step in recorder.steps] == [1.0] * 3
    assert [step.num_tokens for step in recorder.steps] == [5, 1, 1]
    assert [step.prompt_tokens for step in recorder.steps] == [5, 0, 0]
    assert [step.generated_text_tokens for step in recorder.steps] == [1, 1, 1]
    assert [step.first_token_latencies_s for step in recorder.steps] == [(2.0,), (), ()]
    assert [step.inter_token_latencies_s for step in recorder.steps] == [(), (2.0,), (2.0,)]
    assert (first.num_running, first.num_waiting, first.kv_cache_usage) == (1, 0, 0.25)
    assert (third.num_running, third.num_waiting, third.kv_cache_usage) == (0, 0, 0.0)
    assert recorder.rejected == []


def test_a_picture(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for)
    submit(engine, "r", mode=OutputMode.IMAGE)
    run_until_idle(engine)
    (request,) = recorder.finished
    assert request.finish_reason is FinishReason.STOP
    assert request.num_generated_tokens == NUM_CODES + 2
    assert request.image_latencies_s == (7.0,)  # from the first step: queueing is not drawing
    assert [step.num_tokens for step in recorder.steps] == [6, 1, 1, 1]
    assert [step.generated_image_tokens for step in recorder.steps] == [1] * NUM_CODES
    assert [step.generated_text_tokens for step in recorder.steps] == [1, 0, 0, 1]
    assert [step.images for step in recorder.steps] == [0, 0, 0, 1]


def test_pictures_between_words_have_latencies_of_their_own(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for, max_model_len=32)
    bias = {BEGIN_IMAGE: 100.0}
    submit(engine, "r", mode=OutputMode.INTERLEAVED, max_tokens=13, logit_bias=bias, **TALKS)
    run_until_idle(engine)
    (request,) = recorder.finished
    assert request.image_latencies_s == (8.0, 8.0)  # begin_image is a step of its own here
    assert request.num_generated_tokens == 13
    assert totals(recorder.steps) == {
        "prompt_tokens": 5,
        "generated_text_tokens": 5,
        "generated_image_tokens": 8,
        "images": 2,
    }


@pytest.mark.parametrize("mode", OutputMode)
@pytest.mark.parametrize("step_tokens", [2, 5, 512])
def test_steps_and_requests_count_the_same_tokens(
    checkpoint_for: CheckpointFor, mode: OutputMode, step_tokens: int
) -> None:
    engine, recorder = listened(checkpoint_for, max_num_step_tokens=step_tokens)
    for number in range(4):
        submit(engine, str(number), WORDS[: 1 + number], mode=mode, max_tokens=8, seed=number)
    outputs = run_until_idle(engine)
    counted = totals(recorder.steps)
    given_out = [token for output in outputs for token in output.token_ids]
    is_code = [FIRST_CODE <= token < FIRST_CODE + 16 for token in given_out]
    assert counted["generated_image_tokens"] == sum(is_code)
    assert counted["generated_text_tokens"] == len(given_out) - sum(is_code)
    assert sum(request.num_generated_tokens for request in recorder.finished) == len(given_out)
    assert counted["prompt_tokens"] == sum(r.num_prompt_tokens for r in recorder.finished) == 10
    assert max(step.num_tokens for step in recorder.steps) <= step_tokens
    first_tokens = [x for step in recorder.steps for x in step.first_token_latencies_s]
    assert len(first_tokens) <= 4
    assert counted["images"] == sum(len(r.image_latencies_s) for r in recorder.finished)


def test_a_queue_is_seen(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for, max_num_requests=1)
    submit(engine, "a", max_tokens=2, **TALKS)  # arrives at 0
    submit(engine, "b", max_tokens=1, **TALKS)  # arrives at 1
    run_until_idle(engine)  # steps from 2 to 3, 4 to 5; a is over at 6; from 7 to 8
    assert [(s.num_running, s.num_waiting) for s in recorder.steps] == [(1, 1), (0, 1), (0, 0)]
    assert [request.queue_s for request in recorder.finished] == [2.0, 6.0]
    assert [request.e2e_s for request in recorder.finished] == [6.0, 8.0]


def test_a_prompt_that_is_only_scored(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for)
    submit(engine, "r", max_tokens=0, prompt_logprobs=0)
    run_until_idle(engine)
    (request,), (step,) = recorder.finished, recorder.steps
    assert (request.num_generated_tokens, request.time_per_output_token_s) == (0, None)
    assert (request.prefill_s, request.decode_s) == (2.0, 0.0)
    assert step.first_token_latencies_s == ()
    assert (step.prompt_tokens, step.generated_text_tokens) == (5, 0)


def test_one_token_has_no_time_per_output_token(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for)
    submit(engine, "r", max_tokens=1, **TALKS)
    run_until_idle(engine)
    assert recorder.finished[0].time_per_output_token_s is None


def test_eos_counts_as_no_token(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for)
    submit(engine, "r", text=TALKS["text"], logit_bias={2: 100.0})
    run_until_idle(engine)
    assert recorder.finished[0].finish_reason is FinishReason.STOP
    assert recorder.finished[0].num_generated_tokens == 0
    assert totals(recorder.steps)["generated_text_tokens"] == 0


def test_aborts_are_told_with_their_reason(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for, max_num_requests=1)
    submit(engine, "a", max_tokens=5, **TALKS)  # arrives at 0
    submit(engine, "b", max_tokens=5, **TALKS)  # arrives at 1
    engine.step()  # from 2 to 3
    engine.abort("b")  # at 4, never scheduled
    engine.abort("a", FinishReason.STOP)  # at 5, as for a stop string
    engine.abort("a")
    waited, stopped = recorder.finished
    assert waited.finish_reason is FinishReason.ABORT
    assert (waited.queue_s, waited.prefill_s, waited.decode_s, waited.e2e_s) == (3.0, 0, 0, 3.0)
    assert waited.num_generated_tokens == 0
    assert stopped.finish_reason is FinishReason.STOP
    assert (stopped.queue_s, stopped.prefill_s, stopped.e2e_s) == (2.0, 1.0, 5.0)
    assert stopped.num_generated_tokens == 1


def test_no_listener_no_calls(engine: Engine) -> None:
    submit(engine, "r", max_tokens=2)
    run_until_idle(engine)
    assert engine.listener is None


# --- routing -------------------------------------------------------------------------------


class Selections:
    """A `RoutingObserver` that keeps what each layer selected."""

    def __init__(self) -> None:
        self.by_group: dict[tuple[int, str], Tensor] = {}
        self.eligible: dict[tuple[int, str], Tensor] = {}
        self.taken: dict[int, Tensor] = {}

    def experts(
        self, layer: int, group: str, u: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        self.by_group[layer, group] = selected
        self.eligible[layer, group] = eligible

    def depth(self, layer: int, x: Tensor, logits: Tensor, eligible: Tensor, taken: Tensor) -> None:
        self.taken[layer] = taken


@pytest.mark.parametrize("case", ["4t4i_post", "moe_8x_pre", "depth_4t4i_pre", "dense_post"])
def test_routing_counts_are_those_of_the_forward_pass(
    checkpoint_for: CheckpointFor, case: str
) -> None:
    engine, recorder = listened(checkpoint_for, case, max_model_len=64, keep_weights=True)
    prompt = [*WORDS, *PICTURE, 34, 35, *PICTURE, 36]
    submit(engine, "r", prompt, max_tokens=1, **TALKS)
    run_until_idle(engine)
    (step,) = recorder.steps
    seen = Selections()
    forward(engine.model, torch.tensor([prompt]), RoutingPolicy.CAUSAL, seen)
    assert {(layer, group): loads for layer, group, loads in step.expert_tokens} == {
        key: tuple(selected.sum(0).tolist()) for key, selected in seen.by_group.items()
    }
    fanout: dict[str, list[int]] = {}
    for (layer, group), selected in seen.by_group.items():
        counts = fanout.setdefault(group, [0] * (selected.shape[1] + 1))
        for number in selected.sum(1)[seen.eligible[layer, group]].tolist():
            counts[number] += 1
    assert step.experts_per_token == {group: tuple(counts) for group, counts in fanout.items()}
    assert step.depth_tokens == tuple(
        (layer, int(taken.sum()), int((~taken).sum())) for layer, taken in seen.taken.items()
    )
    if case == "4t4i_post":
        assert sum(step.experts_per_token["text"]) == 2 * (len(prompt) - 2 * NUM_CODES)
        assert sum(step.experts_per_token["image"]) == 2 * 2 * NUM_CODES
    assert (step.expert_tokens == ()) == (case == "dense_post")


def test_a_group_without_tokens_is_left_out(checkpoint_for: CheckpointFor) -> None:
    engine, recorder = listened(checkpoint_for)
    submit(engine, "r", max_tokens=1, **TALKS)
    run_until_idle(engine)
    assert set(recorder.steps[0].experts_per_token) == {"text"}
    assert {group for _, group, _ in recorder.steps[0].expert_tokens} == {"text"}
