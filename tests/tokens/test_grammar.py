"""The grammar: spans, room, and the property that no picture can ever go wrong."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momaserve.errors import CheckpointError, PromptError, SamplingError
from momaserve.sampling import OutputMode
from momaserve.tokens.grammar import Choices, Grammar, GrammarSpec, GrammarState
from tests.tokens.builders import (
    BEGIN,
    BOS,
    END,
    EOS,
    FIRST,
    NUM_TOKENS,
    PAD,
    SEP,
    SPEC,
    TEXT_SPEC,
    VOCAB_SIZE,
    model_config,
)

GRAMMAR = Grammar(SPEC)
CODES = [FIRST, FIRST + 1, FIRST + 2, FIRST + 15]
PICTURE = [BEGIN, *CODES, END]
TEXT = GrammarState()


@pytest.mark.parametrize(
    ("prompt", "state"),
    [
        ([BOS], TEXT),
        ([PAD, EOS, BOS, 7], TEXT),
        ([*PICTURE], TEXT),
        ([BOS, *PICTURE, 9, *PICTURE, *PICTURE], TEXT),
        ([BOS, BEGIN], GrammarState(0)),
        ([BOS, *PICTURE, BEGIN, FIRST], GrammarState(1)),
        ([BEGIN, *CODES[:3]], GrammarState(3)),
    ],
)
def test_scan_tells_where_a_prompt_ends(prompt: list[int], state: GrammarState) -> None:
    assert GRAMMAR.scan(prompt) == state


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ([BOS, -1], "position 1 .* from 0 to 415, got -1"),
        ([BOS, VOCAB_SIZE], "position 1 .* got 416"),
        ([10**5000], "position 0 .* more than 20 digits"),
        ([True], "position 0 .* got bool"),
        ([BOS, 1.0], "position 1 .* got float"),
        ([BOS, None], "position 1 .* got NoneType"),
        (["7" * 1000], "position 0 .* got str$"),
        ([FIRST], "position 0: image id 400 outside a picture"),
        ([BOS, END], "position 1: end_image 4 outside a picture"),
        ([*PICTURE, END], "position 6: end_image"),
        ([BEGIN, BEGIN], "position 1: id 3 inside a picture that has 0 of its 4"),
        ([BEGIN, FIRST, 7], "position 2: id 7 inside a picture that has 1 of its 4"),
        ([BEGIN, FIRST, END], "position 2: id 4 inside"),
        ([BEGIN, *CODES, FIRST], "position 5: .* end_image \\(4\\), got 400"),
        ([BEGIN, *CODES, 7], "position 5: .* got 7"),
        ([BEGIN, *CODES], "ends after the 4 image ids"),
    ],
)
def test_scan_refuses_malformed_prompts(prompt: list[int], message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        GRAMMAR.scan(prompt)
    assert caught.value.param == "prompt"
    assert len(str(caught.value)) < 200


def test_text_only_vocabulary_has_no_pictures() -> None:
    grammar = Grammar(TEXT_SPEC)
    assert grammar.scan([BEGIN, END, SEP]) == TEXT  # plain ids there
    assert grammar.choices(TEXT, OutputMode.TEXT, 100) is Choices.TEXT
    grammar.check_room(TEXT, OutputMode.TEXT, 1)
    for mode in (OutputMode.IMAGE, OutputMode.INTERLEAVED):
        with pytest.raises(SamplingError, match="makes no pictures"):
            grammar.check_room(TEXT, mode, 1000)
    with pytest.raises(SamplingError, match="makes no pictures"):
        grammar.opening(TEXT, OutputMode.IMAGE)
    assert not TEXT_SPEC.has_images
    assert TEXT_SPEC.num_image_span_tokens == 0


def test_mode_image_makes_one_picture() -> None:
    mode, state, made = OutputMode.IMAGE, GRAMMAR.scan([BOS, 7]), []
    for token_id in GRAMMAR.opening(state, mode):
        made.append(token_id)
        state, forced, finished = GRAMMAR.advance(state, token_id, mode)
        assert (forced, finished) == ((), False)
    for i, code in enumerate(CODES):
        assert state == GrammarState(i)
        assert GRAMMAR.choices(state, mode, NUM_TOKENS + 1 - i) is Choices.IMAGE
        state, forced, finished = GRAMMAR.advance(state, code, mode)
        made += [code, *forced]
        assert finished == (i == NUM_TOKENS - 1)
    assert made == PICTURE
    assert state == TEXT
    with pytest.raises(ValueError, match="over"):
        GRAMMAR.choices(state, mode, 100)


def test_mode_image_continues_an_open_picture() -> None:
    state = GRAMMAR.scan([BEGIN, *CODES[:3]])
    assert GRAMMAR.opening(state, OutputMode.IMAGE) == ()
    assert GRAMMAR.num_tokens_to_close(state) == 2
    assert GRAMMAR.advance(state, CODES[3], OutputMode.IMAGE) == (TEXT, (END,), True)


def test_text_goes_on_after_the_picture_of_the_prompt() -> None:
    assert GRAMMAR.advance(GrammarState(3), FIRST, OutputMode.TEXT) == (TEXT, (END,), False)
    assert GRAMMAR.advance(TEXT, EOS, OutputMode.TEXT) == (TEXT, (), True)


@pytest.mark.parametrize(
    ("state", "mode", "max_tokens", "fits"),
    [
        (TEXT, OutputMode.TEXT, 0, True),
        (TEXT, OutputMode.INTERLEAVED, 1, True),
        (TEXT, OutputMode.IMAGE, 6, True),
        (TEXT, OutputMode.IMAGE, 5, False),
        (TEXT, OutputMode.IMAGE, 0, False),
        (GrammarState(0), OutputMode.IMAGE, 5, True),
        (GrammarState(0), OutputMode.IMAGE, 4, False),
        (GrammarState(3), OutputMode.TEXT, 2, True),
        (GrammarState(3), OutputMode.TEXT, 1, False),
        (GrammarState(3), OutputMode.INTERLEAVED, 1, False),
        (GrammarState(3), OutputMode.TEXT, 0, True),  # scoring a prompt generates nothing
    ],
)
def test_room_for_the_pictures_an_answer_must_have(
    state: GrammarState, mode: OutputMode, max_tokens: int, fits: bool
) -> None:
    if fits:
        GRAMMAR.check_room(state, mode, max_tokens)
        return
    with pytest.raises(SamplingError, match=f"leave {max_tokens}$") as caught:
        GRAMMAR.check_room(state, mode, max_tokens)
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("mode", "budget", "choices"),
    [
        (OutputMode.TEXT, 1000, Choices.TEXT),
        (OutputMode.INTERLEAVED, 5, Choices.TEXT),
        (OutputMode.INTERLEAVED, 6, Choices.TEXT_OR_IMAGE),
    ],
)
def test_a_picture_begins_only_with_room(mode: OutputMode, budget: int, choices: Choices) -> None:
    assert GRAMMAR.choices(TEXT, mode, budget) is choices


@pytest.mark.parametrize(
    ("state", "token_id", "mode"),
    [
        (TEXT, FIRST, OutputMode.TEXT),
        (TEXT, BEGIN, OutputMode.TEXT),
        (TEXT, END, OutputMode.INTERLEAVED),
        (TEXT, BOS, OutputMode.INTERLEAVED),
        (TEXT, PAD, OutputMode.INTERLEAVED),
        (TEXT, -1, OutputMode.TEXT),
        (TEXT, VOCAB_SIZE, OutputMode.TEXT),
        (TEXT, 7, OutputMode.IMAGE),
        (GrammarState(2), 7, OutputMode.IMAGE),
        (GrammarState(2), END, OutputMode.IMAGE),
    ],
)
def test_a_wrong_mask_is_noticed(state: GrammarState, token_id: int, mode: OutputMode) -> None:
    with pytest.raises(ValueError, match=f"token id {token_id} cannot follow"):
        GRAMMAR.advance(state, token_id, mode)


def test_allowed_ids() -> None:
    text = [i for i in range(-1, VOCAB_SIZE + 1) if SPEC.allows(Choices.TEXT, i)]
    assert text == [EOS, SEP, *range(6, FIRST)]
    both = [i for i in range(VOCAB_SIZE) if SPEC.allows(Choices.TEXT_OR_IMAGE, i)]
    assert both == [EOS, BEGIN, SEP, *range(6, FIRST)]
    image = [i for i in range(VOCAB_SIZE + 1) if SPEC.allows(Choices.IMAGE, i)]
    assert image == [*range(FIRST, VOCAB_SIZE)]


def test_eos_may_be_sampled_even_if_it_is_pad_too() -> None:
    spec = replace(SPEC, pad=EOS)
    assert spec.allows(Choices.TEXT, EOS)
    assert Grammar(spec).advance(TEXT, EOS, OutputMode.TEXT).finished


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos": VOCAB_SIZE}, "bos id 416 is not below"),
        ({"eos": -1}, "eos id -1"),
        ({"pad": FIRST + 3}, "pad id 403 lies among"),
        ({"end_image": BEGIN}, "begin_image id 3 has another meaning"),
        ({"end_image": EOS}, "end_image id 2 has another meaning"),
        ({"end_image": None}, "all or not at all"),
        ({"image_num_codes": 17}, "400..416 do not fit"),
        ({"image_num_codes": 0}, "at least one"),
        ({"tokens_per_image": 0}, "at least one"),
    ],
)
def test_impossible_vocabularies(changes: dict[str, int | None], message: str) -> None:
    fields = {name: getattr(SPEC, name) for name in GrammarSpec.__slots__}
    with pytest.raises(CheckpointError, match=message):
        GrammarSpec(**(fields | changes))


def test_spec_from_config() -> None:
    assert GrammarSpec.from_config(model_config()) == SPEC
    text = GrammarSpec.from_config(model_config(image=None))
    assert text == GrammarSpec(vocab_size=VOCAB_SIZE, bos=BOS, pad=PAD, eos=EOS)


PROMPTS = st.tuples(
    st.sampled_from([[BOS], [BOS, *PICTURE, 9]]),
    st.sampled_from([[], [BEGIN], [BEGIN, *CODES[:2]], [BEGIN, *CODES[:3]]]),
).map(lambda halves: halves[0] + halves[1])


@given(
    prompt=PROMPTS,
    mode=st.sampled_from(OutputMode),
    max_tokens=st.integers(0, 40),
    context_left=st.integers(0, 40),
    data=st.data(),
)
def test_a_picture_never_ends_early_overruns_or_starts_without_room(
    prompt: list[int], mode: OutputMode, max_tokens: int, context_left: int, data: st.DataObject
) -> None:
    """Play an engine that samples anything `choices` holds; the whole must be well-formed."""
    room = min(max_tokens, context_left)
    state = GRAMMAR.scan(prompt)
    try:
        GRAMMAR.check_room(state, mode, room)
    except SamplingError:
        return
    output: list[int] = []
    for token_id in GRAMMAR.opening(state, mode):
        state, forced, finished = GRAMMAR.advance(state, token_id, mode)
        output += [token_id, *forced]
    finished = False
    while not finished and len(output) < room:
        choices = GRAMMAR.choices(state, mode, room - len(output))
        # a few ids stand for all: pictures shall start often
        candidates = [
            i for i in (BEGIN, SEP, 7, EOS, *CODES, BOS, END, PAD) if SPEC.allows(choices, i)
        ]
        token_id = data.draw(st.sampled_from(candidates))
        state, forced, finished = GRAMMAR.advance(state, token_id, mode)
        output += [token_id, *forced]
    assert len(output) <= room
    if room:
        # An oracle that knows spans only: N ids between every begin and end, none elsewhere.
        assert GRAMMAR.scan([*prompt, *output]) == TEXT == state
    text = [i for i in output if i not in SPEC.image_ids]
    assert not {BOS, PAD}.intersection(text)
    if mode is OutputMode.IMAGE:
        assert output[-1] == END
        assert output.count(END) == 1
    if mode is OutputMode.TEXT:
        assert BEGIN not in output


@given(st.lists(st.sampled_from([BOS, SEP, 7, BEGIN, END, *CODES]), max_size=14))
def test_scan_agrees_with_a_pattern(prompt: list[int]) -> None:

    letters = "".join(
        "b" if i == BEGIN else "e" if i == END else "c" if i in SPEC.image_ids else "t"
        for i in prompt
    )
    whole = re.fullmatch(r"(?:t|bc{4}e)*(b(c{0,3}))?", letters)
    if not prompt or whole is None:
        with pytest.raises(PromptError):
            GRAMMAR.scan(prompt)
    else:
        expected = None if whole[1] is None else len(whole[2])
        assert GRAMMAR.scan(prompt) == GrammarState(expected)
