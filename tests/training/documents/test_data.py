"""A data set from files to rows: what a run keeps, what it refuses, and how it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from momaserve.errors import CheckpointError, ConfigError, DataError
from momaserve.tokens.template import DEFAULT_TEMPLATE
from momaserve.training.documents.data import DOCUMENTS_FILE, DocumentData
from momaserve.training.documents.dataset import (
    EncodedDocuments,
    data_fingerprint,
    validation_mask,
)
from momaserve.training.documents.settings import DocumentSettings
from momaserve.training.documents.vocabulary import CHAT_TEMPLATE
from momaserve.training.packing import PackedRows
from tests.training.documents.factory import (
    TEXT_SIZE,
    TOKENS_PER_IMAGE,
    encoder,
    image_part,
    image_tokenizer,
    message,
    noise,
    text_part,
    write,
    write_lines,
)

SETTINGS = DocumentSettings(
    text_vocab_size=TEXT_SIZE, row_length=48, num_rows=2, validation_share=0.2, seed=3
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 texts, 6 pairs, 2 pictures alone, and 4 things that are skipped."""
    data = tmp_path / "data"
    write_lines(data / "lines.jsonl", *({"text": f"text {n} of many"} for n in range(12)), b"{")
    for number in range(6):
        write(data / f"pairs/{number}.png", noise(number))
        write(data / f"pairs/{number}.txt", f"picture {number}")
    for number in range(2):
        write(data / f"alone/{number}.png", noise(100 + number))
    write(data / "broken.png", noise(7)[:200])
    write(data / "blank.txt", " ")
    write(data / "long.txt", "qzx " * 100)
    return data


def open_data(
    folder: Path, settings: DocumentSettings = SETTINGS, out: str = "out"
) -> DocumentData:
    codes = folder.parent / "codes"
    return DocumentData.open(folder, settings, image_tokenizer(codes), folder.parent / out)


def documents_in(rows: PackedRows) -> list[tuple[int, ...]]:
    assert rows.documents is not None
    found = []
    for ids, numbers in zip(rows.token_ids.tolist(), rows.documents.tolist(), strict=True):
        for number in sorted(set(numbers) - {-1}):
            found.append(tuple(i for i, n in zip(ids, numbers, strict=True) if n == number))
    return found


def test_every_document_is_trained_on_or_validates(folder: Path) -> None:
    data = open_data(folder)
    assert data.documents.summary.num_documents == 20
    num_rows = len(data.order.rows_of_epoch(0))
    steps = [data.rows_of_step(step) for step in range(-(-num_rows // 2))]
    trained = {document for rows in steps for document in documents_in(rows)}
    validating = {d for rows in data.validation_batches() for d in documents_in(rows)}
    assert len(trained) + len(validating) == 20
    assert not trained & validating and validating
    assert all(rows.token_ids.shape == (2, 48) for rows in steps)
    assert all(rows.token_ids.shape[1] == 48 for rows in data.validation_batches())
    assert all(document[0] == 0 and document[-1] == 2 for document in trained | validating)


def test_what_the_trainer_gets(folder: Path) -> None:
    data = open_data(folder)
    assert data.config_ids["vocab_size"] == TEXT_SIZE + 16
    assert data.config_ids["image"]["tokens_per_image"] == TOKENS_PER_IMAGE
    assert (folder.parent / "out/tokenizer.json").read_text() == data.text_tokenizer.to_str()
    assert data.chat_template == DEFAULT_TEMPLATE
    for line in (
        "documents  20 (0 conversations), 8 pictures in them",
        f"image {8 * TOKENS_PER_IMAGE};",
        "skipped    4",
        "the line is not valid JSON, for instance:\n             lines.jsonl:13 (column 2)",
        "the text is empty or only white space, for instance:\n             blank.txt",
        "the document is longer than a row (48 tokens), for instance:\n             long.txt",
        "the picture is broken or not a PNG, JPEG, WebP, GIF or BMP, for instance:",
        f"{len(data.validation_numbers)} to validate",
    ):
        assert line in data.summary


def test_conversations_are_served_with_separators(tmp_path: Path) -> None:
    chats = [
        {"messages": [message("user", f"say {n}"), message("assistant", f"{n}")]} for n in range(5)
    ]
    data = DocumentData.open(
        write_lines(tmp_path / "chats.jsonl", *chats), SETTINGS, None, tmp_path / "out"
    )
    assert data.chat_template == CHAT_TEMPLATE
    assert data.config_ids["image"] is None
    assert "5 conversations" in data.summary


def test_a_resumed_run_finds_the_same_rows(folder: Path) -> None:
    first = open_data(folder)
    steps = [first.rows_of_step(step) for step in range(20)]
    again = open_data(folder)
    assert again.summary == first.summary
    assert again.fingerprint == first.fingerprint
    for step in (19, 0, 7):
        found = again.rows_of_step(step)
        for name in ("token_ids", "targets", "positions", "documents", "is_padding"):
            assert torch.equal(getattr(found, name), getattr(steps[step], name))
    pairs = zip(first.validation_batches(), again.validation_batches(), strict=True)
    assert all(torch.equal(one.token_ids, two.token_ids) for one, two in pairs)


def test_a_resumed_run_does_not_encode_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_data(folder)

    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("momaserve.training.documents.encode.Encoder.encode", fail)
    open_data(folder)


def _change_a_word(folder: Path) -> None:
    write(folder / "pairs/3.txt", "picture 4")


def _change_a_pixel(folder: Path) -> None:
    write(folder / "pairs/3.png", noise(333))


def _add_a_line(folder: Path) -> None:
    with (folder / "lines.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')


def _rename(folder: Path) -> None:
    (folder / "alone/0.png").rename(folder / "alone/2.png")


def _mend(folder: Path) -> None:
    write(folder / "broken.png", noise(7))


@pytest.mark.parametrize("change", [_change_a_word, _change_a_pixel, _add_a_line, _rename, _mend])
def test_a_resumed_run_refuses_other_data(folder: Path, change: Any) -> None:
    open_data(folder)
    change(folder)
    with pytest.raises(DataError, match=r"made with another data than .* choose another --out"):
        open_data(folder)
    assert open_data(folder, out="other").documents.summary.num_documents >= 20


def test_a_resumed_run_refuses_other_tokenizers_and_settings(folder: Path) -> None:
    open_data(folder)
    with pytest.raises(DataError, match="another row_length and another seed than"):
        open_data(folder, replace(SETTINGS, row_length=50, seed=4))
    with pytest.raises(DataError, match="another validation_share than"):
        open_data(folder, replace(SETTINGS, validation_share=0.3))
    with pytest.raises(DataError, match="another image tokenizer than"):
        DocumentData.open(folder, SETTINGS, None, folder.parent / "out")
    tokenizer = folder.parent / "out/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(DataError, match="another text tokenizer than"):
        open_data(folder)


def test_what_does_not_matter_is_not_refused(folder: Path) -> None:
    first = open_data(folder)
    write(folder / "README.md", "about this data")
    write(folder / "another blank.txt", "\n")
    (folder / "lines.jsonl").touch()
    moved = folder.rename(folder.parent / "moved")
    again = open_data(moved, replace(SETTINGS, max_validation_batches=1))
    assert again.fingerprint == first.fingerprint
    assert len(again.validation_batches()) == 1


def test_a_broken_file_of_documents(folder: Path) -> None:
    open_data(folder)
    path = folder.parent / "out" / DOCUMENTS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="documents.safetensors cannot be read"):
        open_data(folder)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(DataError, match="documents.safetensors cannot be read"):
        open_data(folder)


def test_data_that_was_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"txt": "misspelt"}, {"txt": "misspelt too"})
    with pytest.raises(DataError, match=r"nothing to learn(.|\n)*'txt'"):
        DocumentData.open(path, SETTINGS, None, tmp_path / "out")
    write_lines(path, {"text": "the same"}, {"text": "the same"})
    with pytest.raises(DataError, match="at least 2 different documents"):
        DocumentData.open(path, SETTINGS, None, tmp_path / "out")
    with pytest.raises(DataError, match="no data at"):
        DocumentData.open(tmp_path / "none", SETTINGS, None, tmp_path / "out")
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        DocumentData.open(path, SETTINGS, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_there_is_used(folder: Path) -> None:
    first = open_data(folder)
    other = folder.parent / "other"
    write(other / "tokenizer.json", first.text_tokenizer.to_str())
    path = write_lines(folder.parent / "few.jsonl", {"text": "one"}, {"text": "two"})
    data = DocumentData.open(path, SETTINGS, None, other)
    assert data.text_tokenizer.to_str() == first.text_tokenizer.to_str()
    write(folder.parent / "bad/tokenizer.json", b"\xff")
    with pytest.raises(DataError, match="tokenizer.json cannot be read"):
        DocumentData.open(path, SETTINGS, None, folder.parent / "bad")


def test_the_summary_counts_what_is_learnt_and_skipped_and_writes_nothing(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    summary = EncodedDocuments.collect(encoder(48).encode(folder, 3), TOKENS_PER_IMAGE).summary
    assert sorted(folder.rglob("*")) == before
    assert summary.num_documents == 20 and summary.num_pictures == 8
    assert summary.skips.total == 4
    assert summary.num_image_tokens == 8 * TOKENS_PER_IMAGE
    assert summary.num_text_tokens > 0 and summary.longest <= 48
    assert summary.num_learnt_tokens == (
        summary.num_text_tokens + summary.num_image_tokens - summary.num_documents
    )


def test_only_three_examples_of_each_reason_are_kept(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *[{"text": ""}] * 7, {"text": "x"}, {"text": "y"})
    summary = EncodedDocuments.collect(encoder().encode(path, 0), TOKENS_PER_IMAGE).summary
    assert list(summary.skips.counts.values()) == [7]
    (examples,) = summary.skips.examples.values()
    assert examples == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_the_split_depends_on_content_and_seed() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 10_000)
    mask = validation_mask(keys, 0.1, seed=0)
    assert 850 < mask.sum() < 1150
    assert np.array_equal(validation_mask(keys[::-1].copy(), 0.1, 0)[::-1], mask)
    assert np.array_equal(validation_mask(keys[:500], 0.1, 0), mask[:500])
    assert not np.array_equal(validation_mask(keys, 0.1, 1), mask)
    twice = np.concatenate([keys, keys])
    assert np.array_equal(validation_mask(twice, 0.1, 0), np.concatenate([mask, mask]))


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
def test_both_sides_have_a_document(share: float) -> None:
    mask = validation_mask(np.array([5, 5, 8, 5]), share, seed=0)
    assert 0 < mask.sum() < 4
    assert mask[0] == mask[1] == mask[3] != mask[2]


def test_the_fingerprint_tells_parts_apart(tmp_path: Path) -> None:
    write(tmp_path / "a.png", noise(0))
    found = []
    for parts in (
        [text_part("ab"), text_part("c")],
        [text_part("a"), text_part("bc")],
        [text_part("abc")],
        [image_part("a.png")],
        [image_part("a.png"), text_part("abc")],
    ):
        path = write_lines(tmp_path / "data.jsonl", {"parts": parts})
        found.append(data_fingerprint(path, 0))
    messages = [message("assistant", "abc")]
    found.append(data_fingerprint(write_lines(path, {"messages": messages}), 0))
    assert len(set(found)) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"text_vocab_size": 261},
        {"row_length": 3},
        {"row_length": 12.0},
        {"num_rows": 0},
        {"num_rows": True},
        {"validation_share": 0.0},
        {"validation_share": 1.0},
        {"validation_share": 1},
        {"validation_share": float("nan")},
        {"split_long": 1},
        {"seed": -1},
        {"max_validation_batches": 0},
    ],
    ids=str,
)
def test_settings_are_checked(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ConfigError, match=name):
        replace(SETTINGS, **change)
