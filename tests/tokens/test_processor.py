"""The processor as the engine and the server use it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from momaserve.errors import CheckpointError, PromptError, SamplingError
from momaserve.tokens.detokenize import ImageDone, ImageProgress, TextDelta
from momaserve.tokens.image import ImageCodec
from momaserve.tokens.processor import Processor
from momaserve.tokens.prompt import ChatMessage, ImagePart, Prompt, TextPart
from tests.tokens.builders import (
    BEGIN,
    BOS,
    END,
    EOS,
    FIRST,
    IMAGE_CONFIG,
    NUM_TOKENS,
    SEP,
    SPEC,
    SPECIALS,
    TEMPLATE,
    TEXT_SIZE,
    codec_model,
    model_config,
    tokenizer,
    tokenizer_definition,
    write_checkpoint,
    write_codec,
)

PICTURE = Image.new("RGB", (8, 8), (255, 0, 0))
PROCESSOR = Processor(
    SPEC,
    text=tokenizer(),
    image=ImageCodec(codec_model(), IMAGE_CONFIG),
    template_source=TEMPLATE,
)


def words(text: str) -> list[int]:
    return tokenizer().encode(text)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path)
    return tmp_path


def test_a_conversation(directory: Path) -> None:
    processor = Processor.load(directory, model_config())
    assert processor.image is not None
    codes = processor.image.encode(PICTURE)
    prompt = processor.encode_chat(
        [
            ChatMessage("user", (TextPart("A cat: "), ImagePart(PICTURE), TextPart("?"))),
            ChatMessage("assistant", (TextPart("Yes."),)),
            ChatMessage("user", (TextPart("Sure?"),)),
        ]
    )
    assert list(prompt.token_ids) == [
        BOS,
        *words("A cat: "),
        *(BEGIN, *codes, END),
        *words("?"),
        SEP,
        *words("Yes."),
        EOS,
        *words("Sure?"),
        SEP,
    ]


def test_text_is_a_message_of_the_user() -> None:
    assert PROCESSOR.encode_text("A cat").token_ids == (BOS, *words("A cat"), SEP)


@given(st.lists(st.sampled_from([*SPECIALS, "<|image|>", "\ue000", "\ue001", "x"])).map("".join))
def test_users_cannot_write_control_tokens(text: str) -> None:
    bos, *middle, sep = PROCESSOR.encode_text(text).token_ids
    assert (bos, sep) == (BOS, SEP)
    assert all(len(SPECIALS) <= i < TEXT_SIZE for i in middle)
    kept = text.replace("\ue000", "").replace("\ue001", "")
    assert tokenizer().decode(middle) == kept


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    ids = PROCESSOR.encode_text(text).token_ids[1:-1]
    assert tokenizer().decode(ids) == text.replace("\ue000", "").replace("\ue001", "")


def test_bad_text() -> None:
    with pytest.raises(PromptError, match="surrogate"):
        PROCESSOR.encode_text("\ud83d")


def test_ids_are_checked() -> None:
    assert PROCESSOR.encode_ids([BOS, BEGIN, FIRST]) == Prompt((BOS, BEGIN, FIRST))
    for bad in ([], [-1], [True], [FIRST], [BEGIN, 9], [10**9]):
        with pytest.raises(PromptError):
            PROCESSOR.encode_ids(bad)


def test_a_template_cannot_open_a_picture_wrongly() -> None:
    processor = Processor(SPEC, text=tokenizer(), template_source="<|end_image|>")
    with pytest.raises(PromptError, match="end_image 4 outside"):
        processor.encode_text("x")


def test_decoder_knows_the_prompts_open_picture() -> None:
    codes = [FIRST, FIRST + 1, FIRST + 2, FIRST + 3]
    whole = [BOS, BEGIN, *codes, END]
    for open_ids in (codes[:3], []):
        prompt = PROCESSOR.encode_ids([*whole, BEGIN, *open_ids])
        events = PROCESSOR.decoder((), prompt).push([*codes[len(open_ids) :], END])
        assert events == [ImageDone(0, tuple(codes))]
    (event,) = PROCESSOR.decoder((), PROCESSOR.encode_ids([BEGIN])).push([FIRST])
    assert isinstance(event, ImageProgress)
    for closed in (whole, [BOS]):
        decoder = PROCESSOR.decoder(("cat",), PROCESSOR.encode_ids(closed))
        assert decoder.push(words("A cat")) == [TextDelta("A ", tuple(words("A cat")))]
        assert decoder.stopped


def test_pictures_are_rendered() -> None:
    assert PROCESSOR.image is not None
    ids = PROCESSOR.image.encode(PICTURE)
    assert PROCESSOR.render(ids) == PROCESSOR.image.decode(ids)
    assert PROCESSOR.render_partial(ids[:2]) == PROCESSOR.image.decode_partial(ids[:2])
    with pytest.raises(PromptError):
        PROCESSOR.render(ids[: NUM_TOKENS - 1])


def test_a_checkpoint_without_files(tmp_path: Path) -> None:
    processor = Processor.load(tmp_path, model_config())
    assert processor.text is None
    assert processor.image is None
    assert processor.encode_ids([BOS, BEGIN, FIRST]).token_ids == (BOS, BEGIN, FIRST)
    with pytest.raises(PromptError, match="^this checkpoint has no tokenizer.json: send token ids"):
        processor.encode_text("x")
    for render in (processor.render, processor.render_partial):
        with pytest.raises(PromptError, match="no image_tokenizer"):
            render([FIRST] * NUM_TOKENS)
    with pytest.raises(PromptError, match="no image_tokenizer"):
        processor.encode_image(PICTURE)
    with pytest.raises(SamplingError, match="stop_token_ids") as caught:
        processor.decoder(["x"])
    assert caught.value.param == "stop"
    assert processor.decoder().push([7]) == [TextDelta("", (7,))]


def test_words_without_pixels(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_definition())
    processor = Processor.load(tmp_path, model_config())
    assert processor.encode_text("A cat").token_ids == (BOS, *words("A cat"))
    with pytest.raises(
        PromptError, match="^this checkpoint has no image_tokenizer: send token ids"
    ):
        processor.encode_chat([ChatMessage("user", (ImagePart(PICTURE),))])


def test_pixels_without_words(tmp_path: Path) -> None:
    write_codec(tmp_path / "image_tokenizer")
    processor = Processor.load(tmp_path, model_config())
    begin, *codes, end = processor.encode_image(PICTURE)
    assert (begin, end, len(codes)) == (BEGIN, END, NUM_TOKENS)
    assert processor.render(codes).size == (8, 8)


def test_text_only_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_definition())
    processor = Processor.load(tmp_path, model_config(image=None))
    with pytest.raises(PromptError, match="no image_tokenizer"):
        processor.encode_chat([ChatMessage("user", (ImagePart(PICTURE),))])
    write_codec(tmp_path / "image_tokenizer")
    with pytest.raises(CheckpointError, match="config.json has no image"):
        Processor.load(tmp_path, model_config(image=None))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer"),
        ("chat_template.jinja", b"{% for %}", "does not compile"),
        ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja cannot be read"),
        ("chat_template.jinja", b"{{ ''.__class__.x }}", "fails on a plain message"),
    ],
)
def test_broken_files(directory: Path, name: str, content: bytes, message: str) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Processor.load(directory, model_config())


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_definition())
    with pytest.raises(CheckpointError, match="vocab_size is 300"):
        Processor.load(tmp_path, model_config(vocab_size=300, image=None))
    with pytest.raises(CheckpointError, match="no special token with id 410 "):
        Processor.load(tmp_path, model_config(eos_token_id=410, image=None))
