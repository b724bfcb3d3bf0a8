"""Stop strings are found whatever pieces the text comes in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from momaserve.tokens.stop import StopMatcher


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow definition: the first end of a stop string, and there the longest one."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ([], ["a", "b"], ["a", "b"]),
        (["stop"], ["a st", "ep"], ["a ", "step"]),
        (["stop"], ["a st", "op b", "c"], ["a ", "", ""]),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""]),
        (["aab"], ["aa", "aab"], ["", "aa"]),
        (["abcd", "bc"], ["ab", "cd"], ["", "a"]),
        (["bc", "abc"], ["xab", "c"], ["x", ""]),
    ],
)
def test_what_is_given_when(stops: list[str], pieces: list[str], expected: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert [matcher.push(piece) for piece in pieces] == expected


def test_held_text_comes_at_the_end() -> None:
    matcher = StopMatcher(["stop"])
    assert matcher.push("sto") == ""
    assert matcher.finish() == "sto"
    assert matcher.finish() == ""
    assert matcher.push("p") == "p"  # what was given out cannot be part of a match
    assert not matcher.stopped


def test_empty_stop_string() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.lists(st.text("ab", max_size=4), max_size=10),
)
def test_pieces_do_not_matter(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    given_out, seen = "", ""
    for piece in pieces:
        given_out += matcher.push(piece)
        seen += piece
        expected, stopped = cut(seen, stops)
        assert expected.startswith(given_out)
        assert matcher.stopped == stopped
        # Nothing is held without need: some stop string could still begin there.
        held = expected[len(given_out) :]
        assert stopped or not held or any(s.startswith(held) and s != held for s in stops)
    given_out += matcher.finish()
    assert (given_out, matcher.stopped) == cut("".join(pieces), stops)
