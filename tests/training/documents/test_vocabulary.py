"""The text tokenizer of a data set, and the ids that a model's configuration gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from momaserve.errors import DataError
from momaserve.models.config import ModelConfig
from momaserve.training.dictionary.corpus import SPECIAL_TOKENS
from momaserve.training.documents.vocabulary import Vocabulary, make_text_tokenizer
from tests.models.factory import make_config
from tests.training.documents.factory import (
    IMAGE_CONFIG,
    TEXT_SIZE,
    message,
    noise,
    text_part,
    tokenizer_definition,
    vocabulary,
    write,
    write_lines,
)


def test_the_tokenizer_learns_every_text_of_the_data(tmp_path: Path) -> None:
    chat = [message("user", "zonk" * 30), message("assistant", "blirp " * 30)]
    write_lines(
        tmp_path / "a.jsonl",
        {"text": "wug " * 40},
        {"parts": [text_part("fleeb " * 40)]},
        {"messages": chat},
        {"text": "skipped " * 100, "id": 1},
    )
    write(tmp_path / "b.txt", "caption " * 40)
    write(tmp_path / "b.png", noise(0))
    made = Vocabulary.parse(make_text_tokenizer(tmp_path, 300), 300, None)
    assert made.tokenizer.get_vocab_size() <= 300
    for word in ("wug", "fleeb", "blirp", "caption"):
        assert len(made.text.encode(f" {word}")) == 1, word
    assert len(made.text.encode("zonkzonk")) == 1
    assert len(made.text.encode(" skipped")) > 1
    assert make_text_tokenizer(tmp_path, 300) == make_text_tokenizer(tmp_path, 300)


def test_without_any_text_there_are_still_all_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.png", noise(0))
    made = Vocabulary.parse(make_text_tokenizer(tmp_path, 400), 400, IMAGE_CONFIG)
    text = "Käse 漢字 😀\0"
    assert made.text.decode(made.text.encode(text)) == text
    assert [made.controls[token] for token in SPECIAL_TOKENS] == list(range(6))


def test_ids_are_those_of_a_model() -> None:
    ids = vocabulary().config_ids()
    assert ids["vocab_size"] == TEXT_SIZE + IMAGE_CONFIG.num_codes
    fields: dict[str, Any] = {**make_config().to_dict(), **ids}
    config = ModelConfig.from_dict(fields)
    assert config.image is not None
    assert config.image.first_token_id == TEXT_SIZE
    assert config.image.tokens_per_image == vocabulary().tokens_per_image
    assert vocabulary().image_span([TEXT_SIZE] * 4) == [3, *[TEXT_SIZE] * 4, 4]


def test_ids_of_a_model_without_pictures() -> None:
    made = Vocabulary.parse(tokenizer_definition(), TEXT_SIZE, None)
    assert made.config_ids()["image"] is None
    assert made.config_ids()["vocab_size"] == TEXT_SIZE


def _without(token: str) -> str:
    definition = json.loads(tokenizer_definition())
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["content"] != token]
    del definition["model"]["vocab"][token]
    return json.dumps(definition)


@pytest.mark.parametrize(
    ("definition", "size", "message"),
    [
        ("{}", TEXT_SIZE, "no tokenizer"),
        ("", TEXT_SIZE, "no tokenizer"),
        (tokenizer_definition(), 270, "ids up to"),
        (_without("<|sep|>"), TEXT_SIZE, r"no <\|sep\|>"),
    ],
    ids=["object", "empty", "too large", "no separator"],
)
def test_tokenizers_that_do_not_fit(definition: str, size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Vocabulary.parse(definition, size, None)
