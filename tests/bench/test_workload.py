"""The mix of requests: exact shares, the same for a seed, within the model's limits."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from momaserve.engine import Engine
from momaserve.errors import ConfigError
from momaserve_bench.workload import Kind, ModelShape, WorkItem, WorkloadSpec, exact_shares

CARD: dict[str, Any] = {
    "vocab_size": 100,
    "max_model_len": 256,
    "has_tokenizer": True,
    "image": {
        "tokens_per_image": 6,
        "first_token_id": 40,
        "num_codes": 20,
        "begin_token_id": 3,
        "end_token_id": 4,
        "size": [64, 64],
    },
}
PIXELS = ModelShape.from_card(CARD)
IDS = replace(PIXELS, has_pixels=False)


def make(shape: ModelShape = IDS, **changes: Any) -> list[WorkItem]:
    return WorkloadSpec(**{"num_prompts": 40, "input_len": 8, "output_len": 5, **changes}).make(
        shape
    )


def of_kind(items: list[WorkItem], kind: Kind) -> list[WorkItem]:
    return [item for item in items if item.kind is kind]


def test_shares_are_exact() -> None:
    shares = {Kind.TEXT: 0.5, Kind.IMAGE_OUTPUT: 0.3, Kind.IMAGE_INPUT: 0.2, Kind.PROBE: 0.0}
    assert Counter(exact_shares(shares, 10)) == {
        Kind.TEXT: 5,
        Kind.IMAGE_OUTPUT: 3,
        Kind.IMAGE_INPUT: 2,
    }
    assert Counter(exact_shares(shares, 1)) == {Kind.TEXT: 1}
    assert len(exact_shares(dict.fromkeys(Kind, 0.25), 7)) == 7
    thirds = {Kind.TEXT: 1 / 3, Kind.IMAGE_OUTPUT: 1 / 3, Kind.PROBE: 1 / 3}
    assert set(Counter(exact_shares(thirds, 300)).values()) == {100}


def test_a_mix_in_a_shuffled_order() -> None:
    items = make(
        image_output_fraction=0.25,
        image_input_fraction=0.2,
        probe_fraction=0.05,
        shared_prefix_fraction=0.5,
        cancel_fraction=0.5,
    )
    assert [item.index for item in items] == list(range(40))
    kinds = [item.kind for item in items]
    assert Counter(kinds) == {
        Kind.TEXT: 20,
        Kind.IMAGE_OUTPUT: 10,
        Kind.IMAGE_INPUT: 8,
        Kind.PROBE: 2,
    }
    assert kinds != sorted(kinds)
    cancelled = [item for item in items if item.cancel_share is not None]
    assert len(cancelled) == 19
    assert all(item.kind is not Kind.PROBE for item in cancelled)
    assert all(0.25 <= (item.cancel_share or 0) <= 0.75 for item in cancelled)


@pytest.mark.parametrize("shape", [IDS, PIXELS])
def test_the_seed_decides(shape: ModelShape) -> None:
    mix = {"image_output_fraction": 0.3, "image_input_fraction": 0.3, "cancel_fraction": 0.1}
    assert make(shape, seed=3, **mix) == make(shape, seed=3, **mix)
    assert make(shape, seed=3, **mix) != make(shape, seed=4, **mix)
    assert len({item.seed for item in make(shape, **mix)}) == 40


def test_prompts_of_ids() -> None:
    items = make(image_output_fraction=0.25, image_input_fraction=0.25, probe_fraction=0.25)
    for item in items:
        assert not item.words and not item.picture
    for item in of_kind(items, Kind.TEXT):
        assert (len(item.token_ids), item.max_tokens) == (8, 5)
        assert not {3, 4, *range(40, 60)} & set(item.token_ids)
    for item in of_kind(items, Kind.PROBE):
        assert (len(item.token_ids), item.max_tokens) == (8, 1)
    for item in of_kind(items, Kind.IMAGE_OUTPUT):
        assert item.token_ids[-1] == 3
        assert (len(item.token_ids), item.max_tokens) == (9, 7)
    for item in of_kind(items, Kind.IMAGE_INPUT):
        begin, *codes, end = item.token_ids[:8]
        assert (begin, end, len(codes), item.max_tokens) == (3, 4, 6, 5)
        assert all(40 <= code < 60 for code in codes)
        assert len(item.token_ids) == 16
    assert len({item.token_ids for item in items}) == 40


def test_prompts_of_words_and_pixels() -> None:
    items = make(PIXELS, image_output_fraction=0.5, image_input_fraction=0.25)
    for item in of_kind(items, Kind.TEXT):  # exact lengths need ids
        assert len(item.token_ids) == 8
    for item in of_kind(items, Kind.IMAGE_OUTPUT):
        assert (len(item.words.split()), item.token_ids, item.picture) == (8, (), b"")
        assert item.max_tokens == 8  # both marks and the codes
    pictures = [item.picture for item in of_kind(items, Kind.IMAGE_INPUT)]
    assert len(set(pictures)) == len(pictures) == 10
    with Image.open(io.BytesIO(pictures[0])) as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))


@pytest.mark.parametrize("shape", [IDS, PIXELS])
def test_half_of_a_prompt_is_shared(shape: ModelShape) -> None:
    mix = {"image_output_fraction": 0.3, "image_input_fraction": 0.3}
    items = make(shape, shared_prefix_fraction=0.5, **mix)
    starts = Counter(
        (item.kind, item.token_ids[:4], tuple(item.words.split()[:4]), item.picture)
        for item in items
    )
    shared = {key: count for key, count in starts.items() if count > 1}
    assert sum(shared.values()) == 20
    assert len(shared) <= 3  # one per kind
    everything = make(shape, shared_prefix_fraction=1.0, **mix)
    assert len({(i.token_ids[:4], i.words[:4], i.picture) for i in everything}) <= 3
    assert len({(i.token_ids, i.words) for i in everything}) == 40  # the rest is their own


def test_engine_and_card_tell_the_same(small_engine: Engine) -> None:
    shape = ModelShape.from_engine(small_engine)
    assert shape == ModelShape(
        vocab_size=64,
        max_model_len=256,
        tokens_per_image=4,
        image_ids=range(4, 20),
        begin_image=21,
        end_image=20,
        has_pixels=False,
    )
    assert 21 not in shape.text_ids() and 3 in shape.text_ids() and 22 in shape.text_ids()


def test_a_model_of_words_alone() -> None:
    shape = ModelShape.from_card({**CARD, "image": None})
    assert (shape.tokens_per_image, shape.has_pixels) == (0, False)
    assert len(make(shape)) == 40
    with pytest.raises(ConfigError, match="this model has no pictures"):
        make(shape, image_input_fraction=0.1)


def test_the_card_of_another_server() -> None:
    with pytest.raises(ConfigError, match="lacks 'image': is it a momaserve server"):
        ModelShape.from_card({"id": "x"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 0}, "--num-prompts must be at least 1, got 0"),
        ({"input_len": 0}, "--input-len must be at least 1, got 0"),
        ({"output_len": -1}, "--output-len must be at least 1, got -1"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"probe_fraction": -0.1}, "--probe-fraction must be between 0 and 1, got -0.1"),
        ({"shared_prefix_fraction": 1.5}, "--shared-prefix-fraction must be between 0 and 1"),
        ({"cancel_fraction": float("nan")}, "--cancel-fraction must be between 0 and 1, got nan"),
        (
            {"image_output_fraction": 0.6, "image_input_fraction": 0.5},
            "add up to more than 1: 1.1",
        ),
        (
            {"text_fraction": 0.5, "image_output_fraction": 0.3},
            "the shares of all kinds must add up to 1, got 0.8",
        ),
        ({"cancel_fraction": 0.5, "output_len": 1}, "needs an --output-len of at least 2"),
        ({"input_len": 250, "output_len": 7}, "up to 257 tokens, more than the model's 256"),
        (
            {"input_len": 249, "output_len": 1, "image_output_fraction": 0.1},
            "up to 257 tokens",
        ),
        (
            {"input_len": 244, "output_len": 5, "image_input_fraction": 0.1},
            "up to 257 tokens",
        ),
    ],
)
def test_what_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_given_shares_may_be_all() -> None:
    items = make(text_fraction=0.7, image_output_fraction=0.3)
    assert len(of_kind(items, Kind.TEXT)) == 28
    assert len(make(input_len=251, output_len=5)) == 40  # just fits
