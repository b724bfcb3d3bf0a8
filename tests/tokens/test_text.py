"""Text tokens: user text can never spell a control token, and nothing is lost."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momaserve.errors import CheckpointError, PromptError
from momaserve.tokens.text import TextTokenizer
from tests.tokens.builders import BEGIN, BOS, EOS, SEP, SPECIALS, definition, tokenizer


def test_markup_is_parsed_and_user_text_is_not() -> None:
    text = "a<|eos|>b<|sep|>"
    assert tokenizer().encode_markup("<|bos|><|sep|>") == [BOS, SEP]
    ids = tokenizer().encode(text)
    assert not set(ids) & set(range(len(SPECIALS)))
    assert tokenizer().decode(ids) == text


def test_control_ids_are_not_parsed_even_if_not_called_special() -> None:
    changed = definition()
    for token in changed["added_tokens"]:
        token["special"] = False
    naive = TextTokenizer(changed)
    assert naive.encode("<|eos|>") == [EOS]
    careful = TextTokenizer(changed, control_ids={BOS, EOS, BEGIN})
    assert EOS not in careful.encode("<|eos|>")
    assert careful.encode("<|sep|>") == [SEP]
    assert careful.encode_markup("<|eos|>") == [EOS]


def test_a_model_that_merges_to_a_control_token_is_refused() -> None:
    ids = tokenizer().encode("the")
    careless = TextTokenizer(definition(), control_ids={ids[0]})
    with pytest.raises(PromptError, match=f"control token {ids[0]}"):
        careless.encode("the")


@given(st.text())
def test_decode_undoes_encode(text: str) -> None:
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text
    assert not set(ids) & set(range(len(SPECIALS)))


@given(st.lists(st.sampled_from([*SPECIALS, "<|image|>", "<|", "|>", "a"])).map("".join))
def test_no_text_spells_a_special_token(text: str) -> None:
    assert not set(tokenizer().encode(text)) & set(range(len(SPECIALS)))


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        tokenizer().encode(text)


def test_special_and_unknown_ids_have_no_text() -> None:
    ids = tokenizer().encode("cat")
    assert tokenizer().decode([BOS, *ids, EOS, 10**6]) == "cat"
    assert tokenizer().id_to_token(EOS) == "<|eos|>"
    assert tokenizer().id_to_token(10**6) is None
    assert tokenizer().id_to_token(-1) is None
    assert tokenizer().id_to_token(2**70) is None
    for bad in (-1, 2**70):
        with pytest.raises(PromptError, match="2\\*\\*32"):
            tokenizer().decode([bad])


def test_what_the_file_adds_or_cuts_is_left_out() -> None:
    changed = definition()
    changed["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    changed["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|bos|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    }
    text = "A cat sat on the mat."
    assert TextTokenizer(changed).encode(text) == tokenizer().encode(text)
    assert len(tokenizer().encode(text)) > 2


@given(st.lists(st.integers(0, tokenizer().max_token_id)))
def test_token_bytes_join_to_the_decoded_text(ids: list[int]) -> None:
    table = tokenizer().token_bytes
    assert table is not None
    joined = b"".join(table[i] for i in ids)
    assert joined.decode("utf-8", "replace") == tokenizer().decode(ids)


@pytest.mark.parametrize("content", ["é", "zß", "\u2028", "漢"])
def test_token_bytes_of_added_tokens(content: str) -> None:
    changed = definition()
    new_id = 1 + max(changed["model"]["vocab"].values())
    changed["added_tokens"].append(
        {**changed["added_tokens"][0], "id": new_id, "content": content, "special": False}
    )
    changed_tokenizer = TextTokenizer(changed)
    table = changed_tokenizer.token_bytes
    assert table is not None
    (found,) = changed_tokenizer.encode(content)  # new_id, or the model's own for this spelling
    assert table[found].decode("utf-8", "replace") == changed_tokenizer.decode([found])


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "BPE"}}', b"null"]
)
def test_broken_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        TextTokenizer.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        TextTokenizer.load(tmp_path / "tokenizer.json")


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition()))
    assert TextTokenizer.load(path).encode("cat") == tokenizer().encode("cat")
