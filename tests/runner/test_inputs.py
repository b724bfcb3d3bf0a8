"""From a plan to the batch that the model reads: rows, positions, policies, scopes, modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from momaserve.config import RoutingPolicy
from momaserve.core.plan import PlannedSequence, StepPlan
from momaserve.layers.batch import POLICY_CODES, ForwardBatch
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.request import Request
from momaserve.runner.inputs import build_batch
from tests.models.factory import make_config
from tests.runner.factory import make_planned, make_request

CAUSAL, CALIBRATED = RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED
EXPERT_CHOICE = RoutingPolicy.EXPERT_CHOICE
CONFIG = make_config()  # image ids 4..19, begin_image 21, end_image 20


def batch_of(
    pairs: Sequence[tuple[Request, PlannedSequence]], config: ModelConfig = CONFIG, **fields: Any
) -> ForwardBatch:
    plan = StepPlan(sequences=tuple(planned for _, planned in pairs))
    requests = {request.request_id: request for request, _ in pairs}
    return build_batch(plan, requests, config, torch.device("cpu"), fields.get("observer"))


def policies_of(batch: ForwardBatch) -> list[RoutingPolicy]:
    names = {code: policy for policy, code in POLICY_CODES.items()}
    return [names[code] for code in batch.routing.policy.tolist()]


def test_rows_follow_the_plan() -> None:
    decoding = make_request("a", [0, 30, 31], [32, 33])
    starting = make_request("b", [0, 25, 26])
    chunk = make_request("c", [0, 27, 28, 29, 22])
    batch = batch_of(
        [
            (decoding, make_planned("a", 4, 1, [0, 1])),
            (starting, make_planned("b", 0, 3, [2])),
            (chunk, make_planned("c", 2, 2, [3])),
        ]
    )
    assert batch.token_ids.tolist() == [33, 0, 25, 26, 28, 29]
    assert batch.positions.tolist() == [4, 0, 1, 2, 2, 3]
    assert batch.token_ids.dtype is batch.positions.dtype is torch.int64
    assert batch.observer is None


def test_a_step_may_cross_from_prompt_to_output() -> None:
    """The forced begin_image of mode image is computed with the end of the prompt."""
    request = make_request("a", [0, 30, 31], [21], routing=CAUSAL, prompt_routing=CALIBRATED)
    batch = batch_of([(request, make_planned("a", 1, 3, [0]))])
    assert batch.token_ids.tolist() == [30, 31, 21]
    assert policies_of(batch) == [CALIBRATED, CALIBRATED, CAUSAL]
    assert batch.routing.policies == {CAUSAL, CALIBRATED}


def test_policies_are_those_of_each_token() -> None:
    pairs = [
        (make_request("a", [0, 30], [31], routing=CALIBRATED), make_planned("a", 2, 1, [0])),
        (make_request("b", [0, 30, 31]), make_planned("b", 0, 3, [1])),
        (
            make_request("c", [0, 30], routing=CALIBRATED, prompt_routing=CAUSAL),
            make_planned("c", 0, 2, [2]),
        ),
    ]
    batch = batch_of(pairs)
    assert policies_of(batch) == [CALIBRATED] + [CAUSAL] * 5
    assert batch.routing.policies == {CAUSAL, CALIBRATED}
    assert batch.routing.segments.tolist() == [-1] * 6
    assert batch.routing.num_segments == 0
    assert batch_of(pairs[1:]).routing.policies == {CAUSAL}


def test_each_expert_choice_prompt_is_a_scope_of_its_own() -> None:
    def chosen(name: str, *output: int) -> Request:
        return make_request(name, [0, 30, 31], output, prompt_routing=EXPERT_CHOICE)

    batch = batch_of(
        [
            (chosen("a", 21), make_planned("a", 0, 4, [0])),
            (make_request("b", [0, 30]), make_planned("b", 0, 2, [1])),
            (chosen("c"), make_planned("c", 0, 3, [2])),
            (chosen("d", 32, 33), make_planned("d", 4, 1, [3, 4])),
        ]
    )
    assert batch.routing.segments.tolist() == [0, 0, 0, -1, -1, -1, 1, 1, 1, -1]
    assert batch.routing.num_segments == 2
    assert batch.routing.policies == {EXPERT_CHOICE, CAUSAL}
    assert policies_of(batch) == [EXPERT_CHOICE] * 3 + [CAUSAL] * 3 + [EXPERT_CHOICE] * 3 + [CAUSAL]


@pytest.mark.parametrize("token", range(CONFIG.vocab_size))
def test_modality_is_a_function_of_the_id(token: int) -> None:
    batch = batch_of([(make_request("a", [token]), make_planned("a", 0, 1, [0]))])
    modality = CONFIG.modality_of(token)
    assert batch.modality.tolist() == [int(modality)]
    assert batch.modalities == {modality}


def test_modalities_are_those_that_occur() -> None:
    prompt = [0, 21, 4, 5, 19, 7, 20, 30]
    batch = batch_of([(make_request("a", prompt), make_planned("a", 0, 8, [0, 1]))])
    assert batch.modality.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert batch.modality.dtype is torch.int8
    assert batch.modalities == {Modality.TEXT, Modality.IMAGE}


def test_a_model_without_pictures_has_text_only() -> None:
    groups = [
        {"name": "all", "modalities": ["text", "image"], "num_experts": 1, "intermediate_size": 8}
    ]
    config = make_config(image=None, expert_groups=groups)
    batch = batch_of([(make_request("a", [0, 5, 20]), make_planned("a", 0, 3, [0]))], config)
    assert batch.modality.tolist() == [0, 0, 0]
    assert batch.modalities == {Modality.TEXT}
