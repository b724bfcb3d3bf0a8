"""Which part of the head a step reads, and for how many rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from momaserve.engine import Engine
from momaserve.sampling import OutputMode
from tests.engine.driver import (
    BEGIN_IMAGE,
    EOS,
    FIRST_CODE,
    WORDS,
    run_until_idle,
    submit,
    tokens_of,
)

DRAWS: Mapping[str, Any] = {"mode": OutputMode.IMAGE, "max_tokens": 5}
PICTURE = [*WORDS, BEGIN_IMAGE]


@pytest.fixture
def read(engine: Engine) -> list[tuple[int, range]]:
    """(rows, ids) of every call for logits."""
    calls: list[tuple[int, range]] = []
    backend = engine._runner._backend

    def logits(hidden: Tensor, ids: range) -> Tensor:
        calls.append((len(hidden), ids))
        return backend.logits(hidden, ids)

    engine._runner._backend = replace(backend, logits=logits)
    return calls


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"ignore_eos": True},
        {"min_tokens": 5},
        {"logit_bias": {30: 2.0, EOS: -3.0}},
        {"repetition_penalty": 1.5},
    ],
)
def test_a_picture_reads_the_heads_of_codes_alone(
    engine: Engine, read: list[tuple[int, range]], fields: dict[str, Any]
) -> None:
    image = engine.model_config.image
    assert image is not None
    submit(engine, "p", PICTURE, **DRAWS, **fields)
    run_until_idle(engine)
    assert read == [(1, range(FIRST_CODE, image.stop_token_id))] * image.tokens_per_image


@pytest.mark.parametrize("fields", [{"logit_bias": {FIRST_CODE: 2.0}}, {"logprobs": 1}])
def test_what_needs_every_id_gets_it(
    engine: Engine, read: list[tuple[int, range]], fields: dict[str, Any]
) -> None:
    submit(engine, "p", PICTURE, **DRAWS, **fields)
    run_until_idle(engine)
    assert {ids for _, ids in read} == {range(engine.model_config.vocab_size)}


def test_pictures_beside_words_are_spared_the_head_of_words(
    engine: Engine, read: list[tuple[int, range]]
) -> None:
    image, every = engine.model_config.image, range(engine.model_config.vocab_size)
    assert image is not None
    codes = range(FIRST_CODE, image.stop_token_id)
    submit(engine, "w", max_tokens=4, ignore_eos=True)
    for name in ("p", "q"):
        submit(engine, name, PICTURE, **DRAWS)
    outputs = run_until_idle(engine)
    assert read[:2] == [(2, codes), (1, every)]
    together = {name: tokens_of(outputs, name) for name in ("w", "p", "q")}
    for name, prompt, fields in (
        ("w", WORDS, {"max_tokens": 4, "ignore_eos": True}),
        ("p", PICTURE, DRAWS),
    ):
        submit(engine, name, prompt, **fields)
        assert tokens_of(run_until_idle(engine), name) == together[name]
    assert together["q"] == together["p"]
