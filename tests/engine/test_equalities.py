"""A request's answer depends on nothing but itself: batch mates, chunks, streaming, n."""

from __future__ import annotations

from dataclasses import replace

import pytest

from momaserve import LLM, SamplingParams
from momaserve.config import EngineConfig, RoutingPolicy, SchedulerConfig
from momaserve.engine import Engine
from momaserve.llm import ChoiceResult
from momaserve.sampling import Distribution, OutputMode
from tests.engine.conftest import CheckpointFor
from tests.reference.checkpoints import sample_ids
from tests.reference.moma_float64 import load_checkpoint

SHAPES = ["dense_post", "moe_8x_pre", "1t1i_post", "4t4i_post", "gqa_pre", "depth_4t4i_post"]
MODES = list(OutputMode)


def make_llm(checkpoint_for: CheckpointFor, case: str, **options: object) -> LLM:
    return LLM(checkpoint_for(case), dtype="float32", block_size=4, **options)


def make_work(
    checkpoint_for: CheckpointFor, case: str, count: int
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Different prompts with different modes, lengths, seeds and ways to draw."""
    config, _ = load_checkpoint(checkpoint_for(case))
    prompts = [
        sample_ids(config, seed, pictures=seed % 3, words=2 + seed % 5) for seed in range(count)
    ]
    ways = [
        Distribution(temperature=0),
        Distribution(temperature=0.8),
        Distribution(temperature=1.2, top_k=5),
        Distribution(temperature=1.0, top_p=0.7),
        Distribution(temperature=1.0, top_k=9, top_p=0.9, min_p=0.05),
    ]
    params = [
        SamplingParams(
            mode=MODES[index % len(MODES)],
            max_tokens=6 + index % 9,
            seed=1000 + index,
            text=ways[index % len(ways)],
            image=ways[(index + 1) % len(ways)],
            ignore_eos=index % 2 == 0,
        )
        for index in range(count)
    ]
    return prompts, params


def choices_of(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> list[ChoiceResult]:
    return [result.choices[0] for result in llm.generate(prompts, params)]


def assert_same(got: list[ChoiceResult], wanted: list[ChoiceResult]) -> None:
    assert [c.token_ids for c in got] == [c.token_ids for c in wanted]
    assert [c.finish_reason for c in got] == [c.finish_reason for c in wanted]


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("batch", [7, 32])
def test_alone_equals_batched(checkpoint_for: CheckpointFor, case: str, batch: int) -> None:
    llm = make_llm(checkpoint_for, case)
    prompts, params = make_work(checkpoint_for, case, batch)
    together = choices_of(llm, prompts, params)
    alone = [
        choices_of(llm, [prompt], [param])[0] for prompt, param in zip(prompts, params, strict=True)
    ]
    assert_same(together, alone)
    assert llm.engine.scheduler.kv_cache.usage == 0
    llm.engine.scheduler.check()


@pytest.mark.parametrize("case", ["4t4i_post", "moe_8x_pre", "depth_4t4i_post"])
@pytest.mark.parametrize("step_tokens", [1, 3, 16])
def test_whole_equals_chunked(checkpoint_for: CheckpointFor, case: str, step_tokens: int) -> None:
    prompts, params = make_work(checkpoint_for, case, 9)
    whole = choices_of(make_llm(checkpoint_for, case), prompts, params)
    chunked = choices_of(
        make_llm(checkpoint_for, case, max_num_step_tokens=step_tokens), prompts, params
    )
    assert_same(chunked, whole)


@pytest.mark.parametrize("mode", MODES)
def test_n_choices_equal_single_requests(checkpoint_for: CheckpointFor, mode: OutputMode) -> None:
    llm = make_llm(checkpoint_for, "4t4i_post")
    (prompt, *_), (param, *_) = make_work(checkpoint_for, "4t4i_post", 1)
    param = replace(param, mode=mode, max_tokens=12, text=Distribution(), image=Distribution())
    (result,) = llm.generate([prompt], replace(param, n=4, seed=50))
    for index, choice in enumerate(result.choices):
        (single,) = choices_of(llm, [prompt], [replace(param, seed=50 + index)])
        assert choice.token_ids == single.token_ids


def test_expert_choice_prompts_do_not_see_their_batch_mates(checkpoint_for: CheckpointFor) -> None:
    llm = make_llm(checkpoint_for, "4t4i_post")
    prompts, params = make_work(checkpoint_for, "4t4i_post", 7)
    params = [replace(p, prompt_routing=RoutingPolicy.EXPERT_CHOICE) for p in params]
    together = choices_of(llm, prompts, params)
    alone = [
        choices_of(llm, [prompt], [param])[0] for prompt, param in zip(prompts, params, strict=True)
    ]
    assert_same(together, alone)


def test_expert_choice_over_the_batch_would_break_the_equality(
    checkpoint_for: CheckpointFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: were the scope the whole batch, mates would change the answer."""
    from momaserve.kernels import reference

    llm = make_llm(checkpoint_for, "4t4i_post")
    prompts, params = make_work(checkpoint_for, "4t4i_post", 7)
    params = [
        replace(p, prompt_routing=RoutingPolicy.EXPERT_CHOICE, max_tokens=0, prompt_logprobs=0)
        for p in params
        if p.mode is not OutputMode.IMAGE
    ]
    prompts = prompts[: len(params)]
    own_scope = reference.expert_choice

    def one_scope(logits, eligible, segments, num_segments, capacity):  # type: ignore[no-untyped-def]
        return own_scope(logits, eligible, segments.clamp_max(0), 1, capacity)

    monkeypatch.setattr(reference, "expert_choice", one_scope)
    together = llm.generate(prompts, params)
    alone = [llm.generate([p], [q])[0] for p, q in zip(prompts, params, strict=True)]
    assert [r.prompt_logprobs for r in together] != [r.prompt_logprobs for r in alone]


def test_streamed_outputs_join_to_the_whole(checkpoint_for: CheckpointFor) -> None:
    prompts, params = make_work(checkpoint_for, "4t4i_post", 6)
    whole = choices_of(make_llm(checkpoint_for, "4t4i_post"), prompts, params)
    engine = Engine.load(
        checkpoint_for("4t4i_post"),
        EngineConfig(dtype="float32", scheduler=SchedulerConfig(max_num_requests=4)),
    )
    tokens: dict[str, list[int]] = {}
    for index, (ids, param) in enumerate(zip(prompts, params, strict=True)):
        prompt = engine.processor.encode_ids(ids)
        engine.add(engine.make_requests(prompt, param, str(index)))
        tokens[str(index)] = []
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    assert list(tokens.values()) == [choice.token_ids for choice in whole]


def test_pictures_are_whole(checkpoint_for: CheckpointFor) -> None:
    llm = make_llm(checkpoint_for, "4t4i_post")
    image = llm.engine.model_config.image
    assert image is not None
    (result,) = llm.generate([[0, 30, 31]], SamplingParams(mode=OutputMode.IMAGE, seed=3, n=3))
    for choice in result.choices:
        first, *codes, last = choice.token_ids
        assert (first, last) == (image.begin_token_id, image.end_token_id)
        assert len(codes) == image.tokens_per_image
        assert all(image.first_token_id <= c < image.stop_token_id for c in codes)
        assert choice.finish_reason == "stop"


def test_a_picture_of_the_prompt_is_continued(checkpoint_for: CheckpointFor) -> None:
    llm = make_llm(checkpoint_for, "4t4i_post")
    prompt = [0, 30, 21, 5, 6]  # begin_image and two of four codes
    (result,) = llm.generate([prompt], SamplingParams(mode=OutputMode.IMAGE, seed=3))
    token_ids = result.choices[0].token_ids
    assert len(token_ids) == 3
    assert token_ids[-1] == 20
