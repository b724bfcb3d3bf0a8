"""The engine's log-probabilities against the independent float64 forward of model.md."""

from __future__ import annotations

import pytest

from momaserve import LLM, SamplingParams
from momaserve.config import RoutingPolicy
from tests.engine.conftest import CheckpointFor
from tests.reference.checkpoints import CASES, sample_ids
from tests.reference.moma_float64 import Policy, load_checkpoint, token_log_probs

TOLERANCE = 1e-3


def scored(llm: LLM, ids: list[int], **params: object) -> list[float]:
    """Log-probabilities of prompt tokens 1, 2, ... as the engine reports them."""
    asked = SamplingParams(max_tokens=0, prompt_logprobs=0, **params)  # type: ignore[arg-type]
    (result,) = llm.generate([ids], asked)
    assert result.prompt_logprobs is not None
    return [entry.logprob for entry in result.prompt_logprobs]


def wanted(checkpoint: CheckpointFor, case: str, ids: list[int], policy: Policy) -> list[float]:
    config, weights = load_checkpoint(checkpoint(case))
    values = token_log_probs(config, weights, ids, policy=policy)
    assert values[0] is None
    return [value for value in values[1:] if value is not None]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("policy", ["causal", "calibrated"])
@pytest.mark.parametrize("case", CASES)
def test_serving_policies(
    checkpoint_for: CheckpointFor, case: str, policy: Policy, backend: str
) -> None:
    llm = LLM(checkpoint_for(case), dtype="float32", block_size=4, backend=backend)
    config, _ = load_checkpoint(checkpoint_for(case))
    ids = sample_ids(config, 3)
    got = scored(llm, ids, routing=RoutingPolicy(policy))
    assert got == pytest.approx(wanted(checkpoint_for, case, ids, policy), abs=TOLERANCE)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_expert_choice_over_the_prompt(
    checkpoint_for: CheckpointFor, case: str, backend: str
) -> None:
    llm = LLM(checkpoint_for(case), dtype="float32", block_size=4, backend=backend)
    config, _ = load_checkpoint(checkpoint_for(case))
    ids = sample_ids(config, 3)
    got = scored(llm, ids, prompt_routing=RoutingPolicy.EXPERT_CHOICE)
    assert got == pytest.approx(wanted(checkpoint_for, case, ids, "expert_choice"), abs=TOLERANCE)


@pytest.mark.parametrize("case", ["4t4i_post", "moe_8x_pre", "depth_4t4i_post"])
def test_a_prompt_computed_in_chunks(checkpoint_for: CheckpointFor, case: str) -> None:
    config, _ = load_checkpoint(checkpoint_for(case))
    ids = sample_ids(config, 3)
    whole = wanted(checkpoint_for, case, ids, "causal")
    for step_tokens in (1, 3, 16):
        llm = LLM(
            checkpoint_for(case), dtype="float32", block_size=4, max_num_step_tokens=step_tokens
        )
        assert scored(llm, ids) == pytest.approx(whole, abs=TOLERANCE)


@pytest.mark.parametrize("case", ["4t4i_post", "depth_4t4i_pre"])
def test_prompts_under_different_policies_share_a_step(
    checkpoint_for: CheckpointFor, case: str
) -> None:
    llm = LLM(checkpoint_for(case), dtype="float32", block_size=4)
    config, _ = load_checkpoint(checkpoint_for(case))
    prompts = [sample_ids(config, seed) for seed in (3, 3, 3)]
    policies: list[Policy] = ["causal", "expert_choice", "calibrated"]
    params = [
        SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_routing=RoutingPolicy(policy))
        for policy in policies
    ]
    results = llm.generate(prompts, params)
    for result, ids, policy in zip(results, prompts, policies, strict=True):
        assert result.prompt_logprobs is not None
        got = [entry.logprob for entry in result.prompt_logprobs]
        assert got == pytest.approx(wanted(checkpoint_for, case, ids, policy), abs=TOLERANCE)


@pytest.mark.parametrize("case", ["4t4i_post", "moe_8x_pre", "depth_4t4i_post", "gqa_pre"])
def test_generated_tokens_are_scored_as_in_one_forward(
    checkpoint_for: CheckpointFor, case: str
) -> None:
    """Decode log-probabilities equal those of a whole forward over prompt and answer."""
    llm = LLM(checkpoint_for(case), dtype="float32", block_size=4)
    config, weights = load_checkpoint(checkpoint_for(case))
    prompt = sample_ids(config, 3)
    params = SamplingParams(max_tokens=12, seed=5, logprobs=0, ignore_eos=True)
    (result,) = llm.generate([prompt], params)
    choice = result.choices[0]
    assert len(choice.token_ids) == 12
    whole = token_log_probs(config, weights, [*prompt, *choice.token_ids], policy="causal")
    got = [entry.logprob for entry in choice.logprobs]
    assert got == pytest.approx(whole[len(prompt) :], abs=TOLERANCE)
