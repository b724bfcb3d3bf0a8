"""Events of an answer: streamed text equals whole text, pictures are counted."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from momaserve.tokens.detokenize import Event, ImageDone, ImageProgress, OutputDecoder, TextDelta
from momaserve.tokens.incremental import incremental_text
from momaserve.tokens.text import TextTokenizer
from tests.tokens.builders import (
    BEGIN,
    BOS,
    END,
    EOS,
    FIRST,
    SENTENCES,
    SPEC,
    TEXT_SPEC,
    definition,
    tokenizer,
)
from tests.tokens.test_stop import cut

CODES = (FIRST, FIRST + 1, FIRST + 2, FIRST + 3)
TEXT_IDS = st.lists(st.integers(5, tokenizer().max_token_id))


def run(
    chunks: Sequence[Sequence[int]], stop: Sequence[str] = (), prefix: Sequence[int] | None = None
) -> list[Event]:
    decoder = OutputDecoder(tokenizer(), SPEC, stop, image_prefix=prefix)
    events = [event for chunk in chunks for event in decoder.push(chunk)]
    events += decoder.finish()
    assert decoder.finish() == []
    return events


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def ids_of(events: Sequence[Event]) -> list[int]:
    return [i for event in events if isinstance(event, TextDelta) for i in event.token_ids]


def single(ids: Sequence[int]) -> list[list[int]]:
    return [[i] for i in ids]


@given(TEXT_IDS)
def test_streamed_text_equals_the_decoded_whole(ids: list[int]) -> None:
    events = run(single(ids))
    assert text_of(events) == tokenizer().decode(ids)
    assert ids_of(events) == ids


@given(st.text(), st.data())
def test_any_unicode_in_any_chunks(text: str, data: st.DataObject) -> None:
    ids = tokenizer().encode(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    chunks = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert text_of(run(chunks)) == text


@given(
    st.lists(st.sampled_from([*SENTENCES[:3], "aab", "😀", "€", "\ufffd"]), max_size=3).map(
        "".join
    ),
    st.lists(st.sampled_from(["aab", "ab", "cat", "😀", "the c", "\ufffd", "€ "]), max_size=3),
    TEXT_IDS,
)
def test_stop_strings_cut_the_stream_as_they_cut_the_whole(
    text: str, stops: list[str], noise: list[int]
) -> None:
    ids = [*tokenizer().encode(text), *noise]
    expected, stopped = cut(tokenizer().decode(ids), stops)
    decoder = OutputDecoder(tokenizer(), SPEC, stops)
    events = [event for i in ids for event in decoder.push([i])] + decoder.finish()
    assert text_of(events) == expected
    assert decoder.stopped == stopped
    assert text_of(run([ids], stops)) == expected


def test_characters_wait_for_all_their_bytes() -> None:
    table = tokenizer().token_bytes
    assert table is not None
    euro = [table.index(bytes([byte])) for byte in "€".encode()]
    assert run(single(euro)) == [
        TextDelta("", (euro[0],)),
        TextDelta("", (euro[1],)),
        TextDelta("€", (euro[2],)),
    ]
    assert run([euro[:2]]) == [TextDelta("", tuple(euro[:2])), TextDelta("\ufffd", ())]


def test_tokens_after_a_stop_string_are_ignored() -> None:
    stop_ids = tokenizer().encode("cat")
    decoder = OutputDecoder(tokenizer(), SPEC, ["cat"])
    (event,) = decoder.push([*tokenizer().encode("a "), *stop_ids, 50, BEGIN, FIRST])
    assert event == TextDelta("a ", (*tokenizer().encode("a "), *stop_ids))
    assert decoder.stopped
    assert decoder.push([50, BEGIN, FIRST]) == []
    assert decoder.finish() == []


def test_a_picture_between_texts() -> None:
    a, b = tokenizer().encode("A"), tokenizer().encode("B")
    assert run(single([*a, BEGIN, *CODES, END, *b])) == [
        TextDelta("A", tuple(a)),
        ImageProgress(0, 1, 4, ()),
        ImageProgress(0, 2, 4, ()),
        ImageProgress(0, 3, 4, ()),
        ImageDone(0, CODES),
        TextDelta("B", tuple(b)),
    ]


def test_progress_keeps_what_it_saw() -> None:
    events = run(single([BEGIN, *CODES, END, BEGIN, *CODES[::-1][:2]]))
    progress = [event for event in events if isinstance(event, ImageProgress)]
    assert [event.token_ids for event in progress[:3]] == [CODES[:1], CODES[:2], CODES[:3]]
    assert [(event.index, event.token_ids) for event in progress[3:]] == [
        (1, (CODES[3],)),
        (1, (CODES[3], CODES[2])),
    ]


def test_one_event_for_a_picture_and_chunk() -> None:
    done = [ImageDone(0, CODES), ImageDone(1, CODES)]
    assert run([[BEGIN, *CODES, END, BEGIN, *CODES, END]]) == done
    assert run([[BEGIN, *CODES[:3]]]) == [ImageProgress(0, 3, 4, ())]
    assert run([[BEGIN, *CODES[:3]], [CODES[3], END]])[1:] == done[:1]


def test_every_code_of_a_chunk_where_that_is_wanted() -> None:
    def shown(index: int, *counts: int) -> list[Event]:
        return [ImageProgress(index, count, 4, ()) for count in counts]

    decoder = OutputDecoder(tokenizer(), SPEC, every_code=True)
    assert decoder.push([BEGIN, *CODES[:3]]) == shown(0, 1, 2, 3)
    second = [*shown(1, 1, 2, 3), ImageDone(1, CODES)]
    assert decoder.push([CODES[3], END, BEGIN, *CODES]) == [ImageDone(0, CODES), *second]


@pytest.mark.parametrize("num_codes", [0, 1, 3])
def test_the_picture_that_the_prompt_began(num_codes: int) -> None:
    events = run(single([*CODES[num_codes:], END]), prefix=CODES[:num_codes])
    assert events[-1] == ImageDone(0, CODES)
    assert len(events) == 4 - num_codes


def test_held_text_comes_before_a_picture() -> None:
    ids = tokenizer().encode("sto")
    events = run(single([*ids, BEGIN, *CODES, END, *tokenizer().encode("p")]), stop=["stop"])
    picture = events.index(ImageDone(0, CODES))
    assert text_of(events[:picture]) == "sto"
    assert text_of(events[picture:]) == "p"


def test_eos_that_is_ignored_has_no_text() -> None:
    assert run([[EOS]]) == [TextDelta("", (EOS,))]


def test_without_tokenizer_there_are_tokens_only() -> None:
    decoder = OutputDecoder(None, SPEC)
    assert decoder.push([7, BEGIN, *CODES]) == [TextDelta("", (7,)), ImageDone(0, CODES)]
    assert decoder.push([END, 8, 9]) == [TextDelta("", (8, 9))]
    assert decoder.push([]) == []
    assert decoder.finish() == []


def test_text_only_model() -> None:
    decoder = OutputDecoder(tokenizer(), TEXT_SPEC)
    ids = tokenizer().encode("a cat")
    assert text_of(decoder.push(ids) + decoder.finish()) == "a cat"


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    padded = tokenizer().max_token_id + 1
    assert run([[padded]], stop=["x"]) == [TextDelta("", (padded,))]


@given(
    st.lists(st.one_of(TEXT_IDS, st.just([BEGIN, *CODES, END]), st.just([EOS])), max_size=5),
    st.data(),
)
def test_chunks_change_nothing(parts: list[list[int]], data: st.DataObject) -> None:
    ids = [i for part in parts for i in part]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    chunks = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    whole, pieces = run([ids]), run(chunks)
    assert text_of(whole) == text_of(pieces)
    assert ids_of(whole) == ids_of(pieces)
    assert [e for e in whole if isinstance(e, ImageDone)] == [
        e for e in pieces if isinstance(e, ImageDone)
    ]


def sentencepiece_like() -> TextTokenizer:
    """Words with a leading ▁ and single bytes: not byte-level, so the window is used."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "▁cat", "s", "▁", "n't"]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True
    )
    built = Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )

    return TextTokenizer(json.loads(built.to_str()))


WINDOWED = sentencepiece_like()


@given(st.lists(st.sampled_from([b"the", b"cat", b"s", "€".encode(), "😀".encode(), b"n't"])))
def test_other_tokenizers_use_a_window(words: list[bytes]) -> None:
    assert WINDOWED.token_bytes is None
    names = {b"the": "▁the", b"cat": "▁cat", b"s": "s", b"n't": "n't"}
    vocabulary = {WINDOWED.id_to_token(i): i for i in range(WINDOWED.max_token_id + 1)}
    ids = [
        vocabulary[name]
        for word in words
        for name in ([names[word]] if word in names else [f"<0x{b:02X}>" for b in word])
    ]
    text = incremental_text(WINDOWED)
    pieces = [text.push(i) for i in ids] + [text.finish()]
    assert "".join(pieces) == WINDOWED.decode(ids)
    assert text.finish() == ""


def test_the_window_stays_small() -> None:
    text = incremental_text(WINDOWED)
    given_out = "".join(text.push(1 + 0xFF) for _ in range(200))
    assert set(given_out) == {"\ufffd"}
    assert len(given_out) > 100


def test_byte_level_garbage_is_given_out_at_once() -> None:
    table = tokenizer().token_bytes
    assert table is not None
    text = incremental_text(tokenizer())
    assert [text.push(table.index(b"\xff")) for _ in range(3)] == ["\ufffd"] * 3


def test_a_definition_without_decoder_uses_the_window() -> None:
    changed = definition() | {"decoder": None}
    plain = TextTokenizer(changed)
    assert plain.token_bytes is None
    ids = [BOS, *plain.encode("a cat sat")]
    text = incremental_text(plain)
    assert "".join([*(text.push(i) for i in ids), text.finish()]) == plain.decode(ids)
