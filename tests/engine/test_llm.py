"""`LLM`: prompts in their several forms, results in their order, stop strings, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from momaserve.errors import (
    CheckpointError,
    ConfigError,
    PromptError,
    RequestError,
    SamplingError,
)
from momaserve.llm import LLM, engine_config
from momaserve.models.random_weights import random_model
from momaserve.models.weights import stored_tensors
from momaserve.outputs import FinishReason
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve.tokens.prompt import Prompt
from momaserve.training.run import save_tensors
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import WORDS
from tests.tokens import builders

GREEDY = Distribution(temperature=0)


@pytest.fixture
def llm(checkpoint_for: CheckpointFor) -> LLM:
    """Reads and writes token ids only."""
    return LLM(checkpoint_for("4t4i_post"), dtype="float32", block_size=4)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """An untrained model with a tokenizer and an image tokenizer."""
    directory = tmp_path_factory.mktemp("speaking")
    config = builders.model_config(hidden_size=16, max_position_embeddings=256)
    builders.write_checkpoint(directory)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))
    model = random_model(config, seed=3, dtype=torch.float32, device=torch.device("cpu"))
    tensors = stored_tensors(model, torch.float32)
    save_tensors(tensors, directory / "model.safetensors", {"format": "pt"})
    return LLM(directory, dtype="float32")


def params_of(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 5, "seed": 1, "ignore_eos": True, **fields})


# --- prompts -------------------------------------------------------------------------------


def test_results_keep_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [[0, 30 + i] * (1 + i % 3) for i in range(12)]
    lengths = [1 + (7 * i) % 5 for i in range(12)]
    each = [params_of(max_tokens=length) for length in lengths]
    results = llm.generate(prompts, each)
    assert [result.prompt_token_ids for result in results] == [tuple(p) for p in prompts]
    assert [len(result.choices[0].token_ids) for result in results] == lengths


def test_forms_of_one_prompt(llm: LLM) -> None:
    forms: list[Any] = [WORDS, [WORDS], Prompt(tuple(WORDS)), [Prompt(tuple(WORDS))]]
    answers = [llm.generate(form, params_of())[0].choices[0].token_ids for form in forms]
    assert answers == [answers[0]] * 4
    assert llm.generate([], params_of()) == []


def test_parts_go_into_a_tuple(speaking: LLM) -> None:
    picture = Image.new("RGB", (8, 8), "white")
    (result,) = speaking.generate((picture, "what is this?"), params_of())
    assert builders.BEGIN in result.prompt_token_ids
    both = speaking.generate([(picture, "a"), "b", ("b",)], params_of())
    assert len(both) == 3
    assert both[1].prompt_token_ids == both[2].prompt_token_ids


@pytest.mark.parametrize(
    "make",
    [
        lambda picture: [picture],
        lambda picture: [picture, "what is this?"],
        lambda picture: ["a", 3],
        lambda picture: [[0, 2], 3],
    ],
)
def test_what_is_no_prompt_is_refused_not_dropped(
    speaking: LLM, make: Callable[[Image.Image], Any]
) -> None:
    with pytest.raises(PromptError, match="a list holds whole prompts"):
        speaking.generate(make(Image.new("RGB", (8, 8))), params_of())


def test_as_many_params_as_prompts(llm: LLM) -> None:
    with pytest.raises(PromptError, match="got 2 prompts and 1 sampling parameters"):
        llm.generate([WORDS, WORDS], [params_of()])


def test_words_need_a_tokenizer(llm: LLM) -> None:
    with pytest.raises(PromptError, match=r"no tokenizer\.json"):
        llm.generate("hello")
    with pytest.raises(SamplingError, match="use stop_token_ids, not stop"):
        llm.generate(WORDS, params_of(stop=("x",)))


# --- results -------------------------------------------------------------------------------


def test_text_and_pictures_come_in_order(speaking: LLM) -> None:
    bias = {builders.BEGIN: 100.0}
    params = params_of(
        mode=OutputMode.INTERLEAVED, max_tokens=14, logit_bias=bias, text=GREEDY, image=GREEDY
    )
    (result,) = speaking.generate("draw", params)
    choice = result.choices[0]
    kinds = [type(part) for part in choice.parts]
    assert kinds[:2] == [Image.Image, Image.Image]
    assert len(choice.images) == 2
    assert choice.images[0].size == (8, 8)
    assert choice.text == "".join(part for part in choice.parts if isinstance(part, str))
    assert choice.token_ids.count(builders.BEGIN) == 2


def test_a_stop_string_ends_an_answer(speaking: LLM) -> None:
    whole = speaking.generate("hello", params_of(max_tokens=40, seed=5))[0].choices[0]
    stop = whole.text[5:7]
    cut = speaking.generate("hello", params_of(max_tokens=40, seed=5, stop=(stop,)))[0].choices[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert len(cut.token_ids) < len(whole.token_ids)
    assert not speaking.engine.has_work
    assert speaking.engine.scheduler.kv_cache.usage == 0


@pytest.mark.parametrize("n", [1, 3])
def test_prompt_logprobs_are_one_per_prompt_token(llm: LLM, n: int) -> None:
    """All choices have the same prompt, and it is told once."""
    (result,) = llm.generate(WORDS, params_of(prompt_logprobs=0, n=n))
    assert result.prompt_logprobs is not None
    assert [entry.token_id for entry in result.prompt_logprobs] == WORDS[1:]
    assert len(result.choices) == n


def test_logprobs_belong_to_the_tokens(llm: LLM) -> None:
    (result,) = llm.generate(WORDS, params_of(mode=OutputMode.IMAGE, logprobs=2, max_tokens=None))
    choice = result.choices[0]
    assert [entry.token_id for entry in choice.logprobs] == choice.token_ids


def test_an_error_is_the_result_of_its_requests(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine._runner, "execute", lambda *_, **__: 1 // 0)
        (result,) = llm.generate(WORDS, params_of())
    assert result.choices[0].finish_reason is FinishReason.ERROR
    assert result.choices[0].error is not None
    assert "ZeroDivisionError" in result.choices[0].error
    assert llm.generate(WORDS, params_of())[0].choices[0].finish_reason is FinishReason.LENGTH


def test_default_params_are_the_checkpoints_own(
    checkpoint_for: CheckpointFor, tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(checkpoint_for("4t4i_post") / name)
    own = {"text": {"temperature": 0.25}, "image": {"top_k": 7}}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    llm = LLM(tmp_path, dtype="float32")
    params = llm.default_params(max_tokens=4)
    assert params.text == Distribution(temperature=0.25)
    assert params.image == Distribution(top_k=7)
    assert params.max_tokens == 4


# --- queue and errors ----------------------------------------------------------------------


def test_more_prompts_than_the_queue_holds(checkpoint_for: CheckpointFor) -> None:
    llm = LLM(
        checkpoint_for("4t4i_post"), dtype="float32", max_num_requests=2, max_queued_requests=3
    )
    results = llm.generate([WORDS] * 20, params_of(max_tokens=3))
    assert [len(result.choices[0].token_ids) for result in results] == [3] * 20


def test_a_bad_prompt_among_good_ones_generates_nothing(llm: LLM) -> None:
    with pytest.raises(PromptError, match="outside a picture"):
        llm.generate([WORDS, [0, 5]], params_of())
    assert not llm.engine.has_work


def test_nothing_is_left_behind_by_an_error(checkpoint_for: CheckpointFor) -> None:
    """More choices than the queue ever holds: known only when they are queued."""
    llm = LLM(checkpoint_for("4t4i_post"), dtype="float32", max_queued_requests=2)
    with pytest.raises(RequestError, match="never holds more than 2"):
        llm.generate([WORDS, WORDS], [params_of(max_tokens=40), params_of(n=3)])
    assert not llm.engine.has_work
    assert llm.engine.scheduler.kv_cache.usage == 0


def test_nothing_is_left_behind_by_an_interrupt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = llm.engine.step, iter(range(3))

    def interrupted() -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([WORDS] * 3, params_of(max_tokens=40))
    assert not llm.engine.has_work
    assert llm.engine.scheduler.kv_cache.usage == 0
    llm.engine.scheduler.check()


def test_options_are_fields_of_the_three_configurations(checkpoint_for: CheckpointFor) -> None:
    config = engine_config({"block_size": 8, "max_num_requests": 3, "dtype": "float32"})
    assert config.cache.block_size == 8
    assert config.scheduler.max_num_requests == 3
    assert config.dtype == "float32"
    with pytest.raises(ConfigError, match="unknown options \\['speed'\\]"):
        LLM(checkpoint_for("4t4i_post"), speed=2)
    with pytest.raises(ConfigError, match="takes no options, got \\['dtype'\\]"):
        LLM(LLM(checkpoint_for("4t4i_post")).engine, dtype="float32")


def test_what_no_queue_could_hold_is_refused_before_anything_runs(
    checkpoint_for: CheckpointFor,
) -> None:
    llm = LLM(checkpoint_for("4t4i_post"), max_queued_requests=1)
    with pytest.raises(RequestError, match="brings 2 requests"):
        llm.generate([WORDS, WORDS], [params_of(), params_of(n=2)])
    assert not llm.engine.has_work


def test_no_max_tokens_means_what_context_and_cache_hold(checkpoint_for: CheckpointFor) -> None:
    bytes_per_token = 2 * 2 * 32 * 4
    llm = LLM(checkpoint_for("4t4i_post"), block_size=4, kv_cache_bytes=12 * bytes_per_token)
    (result,) = llm.generate(WORDS, SamplingParams(seed=1, ignore_eos=True))
    choice = result.choices[0]
    assert len(WORDS) + len(choice.token_ids) == 12
    assert choice.finish_reason is FinishReason.LENGTH


def test_one_stop_string_is_one_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


def test_no_such_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is neither a checkpoint directory nor"):
        LLM(tmp_path / "nowhere")


def test_a_choice_says_how_long_it_took_and_what_it_was_spared(
    checkpoint_for: CheckpointFor,
) -> None:
    llm = LLM(checkpoint_for("4t4i_post"), dtype="float32", block_size=4)
    params = SamplingParams(max_tokens=5, seed=1, ignore_eos=True)
    first, again = (llm.generate([0, *range(30, 40)], params)[0].choices[0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 8)
    for choice in (first, again):
        assert choice.stats is not None
        assert (choice.stats.num_prompt_tokens, choice.stats.num_generated_tokens) == (11, 5)
        assert 0 <= choice.stats.prefill_s <= choice.stats.e2e_s
