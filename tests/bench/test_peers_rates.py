"""Rates, medians and ratios from times that are known."""

from __future__ import annotations

import pytest

from momaserve_bench.peers.rates import best, decode_rate, first_token_s, ratios, summary


def test_decoding_is_timed_from_the_first_token_to_the_last() -> None:
    # One row: three tokens in the two seconds after the first.
    assert decode_rate([[5.0, 6.0, 6.5, 7.0]]) == 1.5
    # Two rows in step: twice that.
    assert decode_rate([[5.0, 6.0, 6.5, 7.0]] * 2) == 3.0


def test_tokens_before_every_row_has_its_first_are_not_counted() -> None:
    # The first row has two tokens at 4.0, when the second gets its first.
    assert decode_rate([[3.0, 4.0, 5.0], [4.0, 5.0, 6.0]]) == 3 / 2


def test_a_run_without_decoding_has_no_rate() -> None:
    with pytest.raises(ValueError, match="no token came after"):
        decode_rate([[1.0], [2.0]])
    with pytest.raises(ValueError, match="no token came after"):
        decode_rate([[2.0, 2.0]])


def test_the_first_token_is_there_when_the_last_row_has_one() -> None:
    assert first_token_s([[0.5, 0.6], [0.7, 0.8]]) == 0.7


def test_summary_gives_the_middle_and_the_ends() -> None:
    one = summary([3.0, 1.0, 2.0, 10.0])
    assert (one.median, one.lowest, one.highest) == (2.5, 1.0, 10.0)


def test_ratios_are_ours_over_theirs_and_the_best_is_the_quickest() -> None:
    peers = {"vllm": 5.0, "transformers": 8.0}
    assert ratios(10.0, peers) == {"vllm": 2.0, "transformers": 1.25}
    assert best(peers) == "transformers"
    assert best({}) is None
