"""Documents of token ids: their form, what is learnt, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from momaserve.models.config import ImageConfig
from momaserve.tokens.grammar import GrammarSpec
from momaserve.tokens.image import ImageCodec, open_image
from momaserve.tokens.processor import Processor
from momaserve.tokens.prompt import ChatMessage, ImagePart, TextPart
from momaserve.training.documents import encode
from momaserve.training.documents.document import Document
from momaserve.training.documents.encode import Encoder
from momaserve.training.documents.pictures import LIMITS
from momaserve.training.documents.record import Skipped
from momaserve.training.documents.vocabulary import template_source
from tests.training.documents.factory import (
    BLUE,
    RED,
    TEXT_SIZE,
    TOKENS_PER_IMAGE,
    data_url,
    encoder,
    image_model,
    image_part,
    message,
    noise,
    png,
    text_part,
    vocabulary,
    write_lines,
)

BOS, PAD, EOS, BEGIN, END, SEP = range(6)


def encode_lines(folder: Path, maker: Encoder, *lines: Any) -> list[Document | Skipped]:
    return list(maker.encode(write_lines(folder / "data.jsonl", *lines), 0))


def documents(folder: Path, maker: Encoder, *lines: Any) -> list[Document]:
    found = encode_lines(folder, maker, *lines)
    return [each for each in found if isinstance(each, Document)]


def words(text: str) -> list[int]:
    return vocabulary().text.encode(text)


def picture(data: bytes) -> list[int]:
    """The span of a picture as serving encodes it, one at a time."""
    return list(processor(1).encode_image(open_image(data, LIMITS)))


def processor(num_chats: int) -> Processor:
    """What serving makes of a checkpoint with these tokenizers."""
    ids = vocabulary().config_ids()
    image = ImageConfig.from_dict(ids["image"])
    spec = GrammarSpec(
        vocab_size=ids["vocab_size"],
        bos=ids["bos_token_id"],
        pad=ids["pad_token_id"],
        eos=ids["eos_token_id"],
        image_first=image.first_token_id,
        image_num_codes=image.num_codes,
        tokens_per_image=image.tokens_per_image,
        begin_image=image.begin_token_id,
        end_image=image.end_token_id,
    )
    return Processor(
        spec,
        text=vocabulary().text,
        image=ImageCodec(image_model(), image),
        template_source=template_source(num_chats),
    )


def test_a_text(tmp_path: Path) -> None:
    (found,) = documents(tmp_path, encoder(), {"text": "a red <|eos|> apple<|begin_image|>"})
    inside = found.token_ids[1:-1]
    assert found.token_ids == [BOS, *words("a red <|eos|> apple<|begin_image|>"), EOS]
    assert not set(inside) & set(range(6))  # what a user wrote is never a control
    assert found.learnt == [False] + [True] * (len(inside) + 1)
    assert (found.num_pictures, found.is_chat) == (0, False)


def test_words_and_pictures_in_order(tmp_path: Path) -> None:
    parts = [image_part(data_url(noise(1))), text_part("a boat"), image_part(data_url(noise(2)))]
    (found,) = documents(tmp_path, encoder(), {"parts": parts})
    first, second = picture(noise(1)), picture(noise(2))
    assert first != second and len(first) == TOKENS_PER_IMAGE + 2
    assert (first[0], first[-1]) == (BEGIN, END) and min(first[1:-1]) >= TEXT_SIZE
    assert found.token_ids == [BOS, *first, *words("a boat"), *second, EOS]
    assert found.learnt == [False] + [True] * (len(found.token_ids) - 1)
    assert found.num_pictures == 2


def test_pictures_are_encoded_in_batches_and_find_their_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH_PICTURES", 3)
    monkeypatch.setattr(encode, "BATCH_RECORDS", 4)
    lines: list[Any] = []
    for number in range(12):
        image = image_part(data_url(noise(number)))
        parts = [image, text_part(str(number)), image_part(data_url(noise(100 + number)))]
        lines += [{"parts": parts}, {"text": f"text {number}"}, {"parts": [image]}]
        lines += [{"parts": [image, image_part(data_url(b"broken"))]}]
    found = encode_lines(tmp_path, encoder(), *lines)
    kept = [each.token_ids for each in found if isinstance(each, Document)]
    expected = []
    for number in range(12):
        one, two = picture(noise(number)), picture(noise(100 + number))
        expected.append([BOS, *one, *words(str(number)), *two, EOS])
        expected += [[BOS, *words(f"text {number}"), EOS], [BOS, *one, EOS]]
    assert kept == expected
    assert sum(isinstance(each, Skipped) for each in found) == 12


CHAT = [
    message("system", "Answer in a word."),
    message("user", [image_part(data_url(png(RED))), text_part("what colour?\ue000")]),
    message("assistant", "red"),
    message("user", "and draw <|sep|> the sky"),
    message("assistant", [text_part("here"), image_part(data_url(png(BLUE)))]),
]


def test_what_is_learnt_of_a_conversation_follows_what_serving_asks(tmp_path: Path) -> None:
    (found,) = documents(tmp_path, encoder(128), {"messages": CHAT})
    red, blue = picture(png(RED)), picture(png(BLUE))
    system, question = words("Answer in a word."), words("what colour?")
    asked = [BOS, *system, SEP, *red, *question, SEP]
    answer = [*words("red"), EOS]
    asked_again = [*words("and draw <|sep|> the sky"), SEP]
    drawn = [*words("here"), *blue, EOS]
    assert found.token_ids == [*asked, *answer, *asked_again, *drawn]
    assert found.learnt == [
        *[False] * len(asked),
        *[True] * len(answer),
        *[False] * len(asked_again),
        *[True] * len(drawn),
    ]
    assert (found.num_pictures, found.is_chat) == (2, True)

    def served(turns: list[dict[str, Any]]) -> list[int]:
        messages = []
        for turn in turns:
            content = turn["content"]
            parts = [text_part(content)] if isinstance(content, str) else content
            data = iter([png(RED), png(BLUE)][-1 if turn["role"] == "assistant" else 0 :])
            messages.append(
                ChatMessage(
                    turn["role"],
                    tuple(
                        TextPart(part["text"])
                        if part["type"] == "text"
                        else ImagePart(open_image(next(data), LIMITS))
                        for part in parts
                    ),
                )
            )
        return list(processor(1).encode_chat(messages).token_ids)

    assert served(CHAT[:2]) == asked
    assert served(CHAT[:4]) == [*asked, *answer, *asked_again]


def test_without_conversations_a_served_prompt_begins_as_documents_do(tmp_path: Path) -> None:
    parts = [text_part("a red apple"), image_part(data_url(png(RED)))]
    (found,) = documents(tmp_path, encoder(), {"parts": parts})
    prompt = list(processor(0).encode_text("a red apple").token_ids)
    assert found.token_ids == [*prompt, *picture(png(RED)), EOS]


def test_an_answer_to_nothing_is_learnt_whole(tmp_path: Path) -> None:
    (found,) = documents(tmp_path, encoder(), {"messages": [message("assistant", "hi")]})
    assert found.token_ids == [BOS, *words("hi"), EOS]
    assert found.learnt == [False, *[True] * (len(found.token_ids) - 1)]


def test_a_document_may_fill_a_row_and_no_more(tmp_path: Path) -> None:
    text = "qzx" * 6  # no merges: a token each
    length = len(words(text)) + 2
    chat = {"messages": [message("user", text), message("assistant", text)]}
    assert documents(tmp_path, encoder(length), {"text": text})
    assert documents(tmp_path, encoder(2 * length - 1), chat)
    for maker, line in ((encoder(length - 1), {"text": text}), (encoder(2 * length - 2), chat)):
        (skipped,) = encode_lines(tmp_path, maker, line)
        assert isinstance(skipped, Skipped)
        assert skipped.reason == f"{encode.TOO_LONG} ({maker.row_length} tokens)"


def test_too_many_pictures_are_refused_before_one_is_opened(tmp_path: Path) -> None:
    parts = [image_part(data_url(b"broken"))] * 11
    (skipped,) = encode_lines(tmp_path, encoder(64), {"parts": parts})
    assert isinstance(skipped, Skipped) and skipped.reason.startswith(encode.TOO_LONG)


def test_a_conversation_of_too_many_turns_is_refused_before_it_is_rendered(tmp_path: Path) -> None:
    turns = [message("user", "x"), message("assistant", "y")] * 5000
    (skipped,) = encode_lines(tmp_path, encoder(64), {"messages": turns})
    assert isinstance(skipped, Skipped) and skipped.reason.startswith(encode.TOO_LONG)


@pytest.mark.parametrize("num_words", [13, 30, 60, 61])
def test_long_texts_are_cut_if_wanted(tmp_path: Path, num_words: int) -> None:
    text = "".join("qzxj"[number % 4] for number in range(num_words))
    ids = words(text)
    found = documents(tmp_path, encoder(12, split_long=True), {"text": text})
    assert [token for each in found for token in each.token_ids[1:-1]] == ids
    for number, each in enumerate(found):
        is_last = number == len(found) - 1
        assert (each.token_ids[0], each.token_ids[-1]) == (BOS, EOS)
        assert len(each.token_ids) == 12 or is_last
        assert each.learnt == [False, *[True] * (len(each.token_ids) - 2), is_last]
    assert len({each.key for each in found}) == 1


def test_only_texts_are_cut(tmp_path: Path) -> None:
    long = "qzx" * 20
    maker = encoder(20, split_long=True)
    chat = {"messages": [message("user", long), message("assistant", long)]}
    mixed = {"parts": [text_part(long), image_part(data_url(png()))]}
    found = encode_lines(tmp_path, maker, chat, mixed)
    assert [isinstance(each, Skipped) for each in found] == [True, True]


def test_pictures_without_an_image_tokenizer(tmp_path: Path) -> None:
    lines = [{"parts": [image_part(data_url(png()))]}, {"text": "words"}]
    skipped, kept = encode_lines(tmp_path, encoder(has_images=False), *lines)
    assert isinstance(skipped, Skipped) and skipped.reason == encode.NO_IMAGE_TOKENIZER
    assert isinstance(kept, Document)


def test_keys_are_of_the_content_in_any_order(tmp_path: Path) -> None:
    image = image_part(data_url(png(RED)))
    lines: list[Any] = [
        {"parts": [text_part("red"), image]},
        {"parts": [image, text_part("red")]},
        {"parts": [text_part("red")]},
        {"text": "red"},
        {"parts": [text_part("blue"), image]},
        {"parts": [text_part("red"), image_part(data_url(noise(5)))]},
    ]
    keys = [each.key for each in documents(tmp_path, encoder(), *lines)]
    assert keys[0] == keys[1] and keys[2] == keys[3]
    assert len(set(keys)) == 4
    assert all(0 <= key < 2**63 for key in keys)


def test_encoding_draws_nothing(tmp_path: Path) -> None:
    lines = [{"parts": [image_part(data_url(noise(n))), text_part("x")]} for n in range(5)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    maker = encoder()
    torch.set_rng_state(before)
    first = encode_lines(tmp_path, maker, *lines)
    assert torch.equal(torch.get_rng_state(), before)
    assert encode_lines(tmp_path, maker, *lines) == first
