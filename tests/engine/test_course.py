"""One request from its first step to its end: stops, aborts, failures, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from momaserve.engine import Engine
from momaserve.outputs import FinishReason, TokenLogprob, TokenOutput
from momaserve.sampling import Distribution, OutputMode
from tests.engine.conftest import CheckpointFor
from tests.engine.driver import (
    BEGIN_IMAGE,
    END_IMAGE,
    EOS,
    FIRST_CODE,
    NUM_CODES,
    WORDS,
    Recorder,
    answer,
    make_engine,
    reason_of,
    run_until_idle,
    submit,
    tokens_of,
)

GREEDY = Distribution(temperature=0)
TALKS: dict[str, Any] = {"text": GREEDY, "ignore_eos": True}
"""Deterministic text that does not end by itself."""
STOP, LENGTH, ABORT = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT


def outputs_of(
    engine: Engine, prompt: Sequence[int] = WORDS, **fields: Any
) -> tuple[list[TokenOutput], FinishReason]:
    submit(engine, "r", prompt, **fields)
    outputs = run_until_idle(engine)
    return outputs, reason_of(outputs, "r")


# --- how answers end -----------------------------------------------------------------------


def test_max_tokens_ends_an_answer(engine: Engine) -> None:
    for max_tokens in (1, 2, 7):
        outputs, reason = outputs_of(engine, max_tokens=max_tokens, **TALKS)
        assert reason is LENGTH
        assert len(tokens_of(outputs, "r")) == max_tokens
        assert outputs[-1].stop_token_id is None


def test_nothing_is_generated_for_max_tokens_zero(engine: Engine) -> None:
    outputs, reason = outputs_of(engine, max_tokens=0, logprobs=1)
    assert reason is LENGTH
    assert [output.token_ids for output in outputs] == [()]
    assert outputs[0].logprobs == ()
    assert outputs[0].prompt_logprobs is None


def test_the_context_ends_an_answer(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_model_len=9)
    outputs, reason = outputs_of(engine, **TALKS)
    assert reason is LENGTH
    assert len(tokens_of(outputs, "r")) == 9 - len(WORDS)


def test_eos_ends_an_answer_and_is_not_part_of_it(engine: Engine) -> None:
    outputs, reason = outputs_of(engine, logit_bias={EOS: 100.0}, text=GREEDY, logprobs=0)
    assert reason is STOP
    (last,) = outputs
    assert last.stats is not None and last.stats.finish_reason is STOP
    assert replace(last, stats=None) == TokenOutput(
        request_id="r", token_ids=(), logprobs=(), finish_reason=STOP, stop_token_id=EOS
    )


def test_ignored_eos_is_never_drawn(engine: Engine) -> None:
    fields: dict[str, Any] = {"logit_bias": {EOS: 100.0}, "max_tokens": 30, "ignore_eos": True}
    for text in (GREEDY, Distribution(), Distribution(top_k=2), Distribution(top_p=0.5)):
        outputs, reason = outputs_of(engine, text=text, **fields)
        assert reason is LENGTH
        assert EOS not in tokens_of(outputs, "r")


def test_a_stop_token_ends_an_answer_where_it_would_have_come(engine: Engine) -> None:
    whole = answer(engine, max_tokens=12, **TALKS)
    assert len(set(whole)) > 3  # else this test shows nothing
    for stop in set(whole):
        outputs, reason = outputs_of(engine, max_tokens=12, stop_token_ids=(63, stop), **TALKS)
        assert reason is STOP
        assert outputs[-1].stop_token_id == stop
        assert tokens_of(outputs, "r") == whole[: whole.index(stop)]


def test_a_stop_token_as_the_last_one_is_a_stop(engine: Engine) -> None:
    whole = answer(engine, max_tokens=12, **TALKS)
    last = whole.index(next(token for token in whole if token != whole[0]))
    outputs, reason = outputs_of(
        engine, max_tokens=last + 1, stop_token_ids=(whole[last],), **TALKS
    )
    assert reason is STOP
    assert tokens_of(outputs, "r") == whole[:last]


def test_a_picture_ends_with_its_last_code(engine: Engine) -> None:
    """Stop tokens do not cut a picture, and end_image comes with the last code."""
    codes = tuple(range(FIRST_CODE, FIRST_CODE + 16))
    outputs, reason = outputs_of(engine, mode=OutputMode.IMAGE, stop_token_ids=codes)
    assert reason is STOP
    assert [len(output.token_ids) for output in outputs] == [2, 1, 1, 2]
    first, *drawn, last = tokens_of(outputs, "r")
    assert (first, last, len(drawn)) == (BEGIN_IMAGE, END_IMAGE, NUM_CODES)
    assert set(drawn) <= set(codes)


def test_interleaved_pictures_are_whole_whatever_the_budget(engine: Engine) -> None:
    """The model is made to draw as soon as the grammar lets it."""
    for max_tokens in range(1, 15):
        bias = {BEGIN_IMAGE: 100.0}
        outputs, reason = outputs_of(
            engine, mode=OutputMode.INTERLEAVED, max_tokens=max_tokens, logit_bias=bias, **TALKS
        )
        tokens = tokens_of(outputs, "r")
        assert reason is LENGTH
        assert len(tokens) == max_tokens
        assert tokens.count(BEGIN_IMAGE) == tokens.count(END_IMAGE) == max_tokens // 6
        for start in (i for i, token in enumerate(tokens) if token == BEGIN_IMAGE):
            assert tokens[start + NUM_CODES + 1] == END_IMAGE


def test_text_has_no_pictures(engine: Engine) -> None:
    bias = {BEGIN_IMAGE: 100.0, FIRST_CODE: 100.0}
    tokens = answer(engine, max_tokens=20, logit_bias=bias, ignore_eos=True)
    assert not set(tokens) & set(range(FIRST_CODE, BEGIN_IMAGE + 1))


# --- aborts --------------------------------------------------------------------------------


def test_an_abort_while_waiting(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_requests=1)
    submit(engine, "a", max_tokens=3, **TALKS)
    submit(engine, "b", max_tokens=3, **TALKS)
    engine.step()
    assert engine.scheduler.num_waiting == 1
    assert engine.abort("b")
    assert not engine.abort("b")
    assert engine.scheduler.num_waiting == 0
    assert {output.request_id for output in run_until_idle(engine)} == {"a"}


def test_an_abort_in_the_middle_of_a_prompt(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_step_tokens=4)
    submit(engine, "a", [30] * 12, max_tokens=3)
    assert engine.step() == []
    assert engine.scheduler.kv_cache.usage > 0
    assert engine.abort("a")
    assert engine.scheduler.kv_cache.usage == 0
    engine.scheduler.check()
    assert not engine.has_work
    assert engine.step() == []


@pytest.mark.parametrize("mode", OutputMode)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_an_abort_while_generating(engine: Engine, mode: OutputMode, num_steps: int) -> None:
    fields: dict[str, Any] = {"mode": mode, "max_tokens": 40, "ignore_eos": True}
    wanted = answer(engine, **fields)
    submit(engine, "a", **fields)
    submit(engine, "b", cache_salt="another tenant", **fields)  # shares no block with a
    outputs: list[TokenOutput] = []
    for _ in range(num_steps):
        outputs += engine.step()
    used = engine.scheduler.kv_cache.usage
    assert engine.abort("a")
    assert engine.scheduler.kv_cache.usage == used / 2
    outputs += run_until_idle(engine)
    assert tokens_of(outputs, "b") == wanted
    assert tokens_of(outputs, "a") == wanted[: len(tokens_of(outputs, "a"))]
    assert not engine.abort("a")


def test_a_finished_or_unknown_request_cannot_be_aborted(engine: Engine) -> None:
    answer(engine, max_tokens=1)
    assert not engine.abort("alone")
    assert not engine.abort("nobody")


# --- failures ------------------------------------------------------------------------------


def test_a_step_that_raises_ends_its_requests_only(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.listener = listener = Recorder()
    execute = engine._runner.execute

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("secret of the device")

    submit(engine, "a", max_tokens=3, **TALKS)
    submit(engine, "b", mode=OutputMode.IMAGE)
    engine.step()
    monkeypatch.setattr(engine._runner, "execute", broken)
    outputs = engine.step()
    assert [(o.request_id, o.finish_reason, o.token_ids) for o in outputs] == [
        ("a", FinishReason.ERROR, ()),
        ("b", FinishReason.ERROR, ()),
    ]
    for output in outputs:
        assert output.error == "the engine could not compute this request: RuntimeError"
    assert [stats.finish_reason for stats in listener.finished] == [FinishReason.ERROR] * 2
    assert not engine.has_work
    assert engine.scheduler.kv_cache.usage == 0
    engine.scheduler.check()
    monkeypatch.setattr(engine._runner, "execute", execute)
    assert len(answer(engine, max_tokens=3, **TALKS)) == 3


def test_waiting_requests_survive_a_step_that_raises(
    checkpoint_for: CheckpointFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_requests=1)
    wanted = answer(engine, max_tokens=3, **TALKS)
    submit(engine, "a", max_tokens=3, **TALKS)
    submit(engine, "b", max_tokens=3, **TALKS)
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "execute", lambda *_, **__: 1 // 0)
        assert [output.request_id for output in engine.step()] == ["a"]
    assert tokens_of(run_until_idle(engine), "b") == wanted


@pytest.mark.parametrize("text", [GREEDY, Distribution(), Distribution(top_k=3)], ids=str)
def test_logits_that_are_no_numbers_end_their_request_only(
    engine: Engine, text: Distribution
) -> None:
    """Float16 overflows, for one: nothing may be drawn from it, and mates must not notice."""
    fields: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "text": text}
    wanted = answer(engine, **fields)
    engine.model.embed_tokens.data[50] = float("nan")  # only prompts with this word are ill
    engine.listener = listener = Recorder()
    submit(engine, "ill", [0, 50, *WORDS, 33, 34, 35], logprobs=2, **fields)
    submit(engine, "well", **fields)
    outputs = run_until_idle(engine)
    assert reason_of(outputs, "ill") is FinishReason.ERROR
    assert tokens_of(outputs, "ill") == []
    (error,) = [o.error for o in outputs if o.request_id == "ill"]
    assert error == "the engine could not compute this request: its logits are not finite"
    assert tokens_of(outputs, "well") == wanted
    assert reason_of(outputs, "well") is LENGTH
    assert [stats.finish_reason for stats in listener.finished] == [FinishReason.ERROR, LENGTH]
    assert answer(engine, **fields) == wanted  # on the very blocks that the ill one had


def test_scores_that_are_no_numbers_are_not_given_out(checkpoint_for: CheckpointFor) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_step_tokens=4)
    engine.model.embed_tokens.data[50] = float("nan")
    outputs, reason = outputs_of(
        engine, [0, 50, 31, 32, 33, 34, 35], max_tokens=0, prompt_logprobs=0
    )
    assert reason is FinishReason.ERROR
    assert [output.prompt_logprobs for output in outputs] == [None]


# --- log-probabilities ---------------------------------------------------------------------


def logprobs_of(outputs: Sequence[TokenOutput]) -> list[TokenLogprob]:
    return [entry for output in outputs for entry in output.logprobs or ()]


def test_no_logprobs_unless_asked(engine: Engine) -> None:
    outputs, _ = outputs_of(engine, max_tokens=3, **TALKS)
    assert all(output.logprobs is None and output.prompt_logprobs is None for output in outputs)


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_generated_logprobs(engine: Engine, num_top: int) -> None:
    outputs, _ = outputs_of(engine, max_tokens=5, logprobs=num_top, ignore_eos=True)
    entries = logprobs_of(outputs)
    assert [entry.token_id for entry in entries] == tokens_of(outputs, "r")
    assert all(len(o.logprobs or ()) == len(o.token_ids) for o in outputs)
    for entry in entries:
        assert entry.logprob < 0
        assert len(entry.top) == num_top
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        for token, value in entry.top:
            assert value >= entry.logprob or token != entry.token_id
            if token == entry.token_id:
                assert value == entry.logprob


def test_logprobs_are_those_of_the_model_not_of_the_sampler(engine: Engine) -> None:
    """Bias, mask and temperature change what is drawn, not what is reported."""
    plain, _ = outputs_of(engine, max_tokens=1, logprobs=20, **TALKS)
    (first,) = logprobs_of(plain)
    other = first.top[7][0]
    shifted, _ = outputs_of(
        engine,
        max_tokens=1,
        logprobs=20,
        logit_bias={other: 100.0},
        cache_salt="computed again",
        text=Distribution(temperature=0.3, top_k=4),
    )
    (entry,) = logprobs_of(shifted)
    assert entry.token_id == other or other in (EOS, BEGIN_IMAGE, END_IMAGE)
    assert entry.top == first.top


def test_forced_tokens_have_logprob_zero(engine: Engine) -> None:
    outputs, _ = outputs_of(engine, mode=OutputMode.IMAGE, logprobs=3)
    begin, *codes, end = logprobs_of(outputs)
    assert begin == TokenLogprob(BEGIN_IMAGE, 0.0)
    assert end == TokenLogprob(END_IMAGE, 0.0)
    assert len(codes) == NUM_CODES
    assert all(entry.logprob < 0 and len(entry.top) == 3 for entry in codes)


@pytest.mark.parametrize("step_tokens", [1, 3, 512])
def test_prompt_logprobs_come_once_and_complete(
    checkpoint_for: CheckpointFor, step_tokens: int
) -> None:
    engine = make_engine(checkpoint_for("4t4i_post"), max_num_step_tokens=step_tokens)
    outputs, _ = outputs_of(engine, max_tokens=3, prompt_logprobs=2, **TALKS)
    with_entries = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
    assert len(with_entries) == 1
    assert outputs[0].prompt_logprobs is not None
    assert [entry.token_id for entry in with_entries[0]] == WORDS[1:]
    assert all(entry.logprob < 0 and len(entry.top) == 2 for entry in with_entries[0])


def test_prompt_logprobs_equal_those_of_generating_it(engine: Engine) -> None:
    outputs, _ = outputs_of(engine, max_tokens=6, logprobs=4, **TALKS)
    generated = logprobs_of(outputs)
    scored, _ = outputs_of(
        engine, [*WORDS, *tokens_of(outputs, "r")], max_tokens=0, prompt_logprobs=4
    )
    entries = (scored[0].prompt_logprobs or ())[len(WORDS) - 1 :]
    assert [entry.token_id for entry in entries] == [entry.token_id for entry in generated]
    for entry, wanted in zip(entries, generated, strict=True):
        assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_a_prompt_of_one_token_has_no_entries(engine: Engine) -> None:
    outputs, _ = outputs_of(engine, [0], max_tokens=2, prompt_logprobs=1, **TALKS)
    assert [output.prompt_logprobs for output in outputs] == [(), None]


def test_prompt_logprobs_of_a_forced_opening(engine: Engine) -> None:
    """begin_image follows the prompt, but is not of it."""
    outputs, _ = outputs_of(engine, mode=OutputMode.IMAGE, prompt_logprobs=0)
    entries = outputs[0].prompt_logprobs
    assert entries is not None
    assert [entry.token_id for entry in entries] == WORDS[1:]
