"""Exact examples of what a block's key depends on."""

from __future__ import annotations

import pytest

from momaserve.config import RoutingPolicy
from momaserve.core.block_key import next_block_key, root_key
from momaserve.request import TokenSequence
from tests.core.factory import make_sequence

CAUSAL, CALIBRATED = RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED


def keys(sequence: TokenSequence, num_blocks: int) -> list[bytes]:
    assert sequence.root_key is not None
    for _ in range(num_blocks):
        parent = sequence.block_keys[-1] if sequence.block_keys else sequence.root_key
        sequence.block_keys.append(next_block_key(sequence, parent, 2))
    return sequence.block_keys


def test_equal_tokens_have_equal_keys() -> None:
    assert keys(make_sequence([1, 2, 3, 4]), 2) == keys(make_sequence([1, 2, 3, 4, 5]), 2)


def test_a_key_is_a_sha256_that_does_not_change_between_releases() -> None:
    first, second = keys(make_sequence([1, 2, 3, 4]), 2)
    assert len({first, second}) == 2
    assert len(first) == len(second) == 32
    assert root_key(None).hex()[:8] == "e3b0c442"


@pytest.mark.parametrize("token_ids", [[1, 9, 3, 4], [9, 2, 3, 4], [2, 1, 3, 4], [1, 258, 3, 4]])
def test_a_key_depends_on_all_tokens_before_the_end_of_its_block(token_ids: list[int]) -> None:
    one, other = keys(make_sequence([1, 2, 3, 4]), 2), keys(make_sequence(token_ids), 2)
    assert one[0] != other[0]
    assert one[1] != other[1]


def test_a_key_does_not_depend_on_what_follows_its_block() -> None:
    one, other = keys(make_sequence([1, 2, 3, 4]), 2), keys(make_sequence([1, 2, 3, 5]), 2)
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_the_same_tokens_at_other_positions_have_other_keys() -> None:
    one, other = keys(make_sequence([1, 2, 1, 2]), 2)
    assert one != other


def test_salts_isolate() -> None:
    salts = [None, "", "a", "b", "salt:a"]
    roots = [root_key(salt) for salt in salts]
    assert len(set(roots)) == len(salts)
    found = [keys(make_sequence([1, 2], salt=salt), 1)[0] for salt in salts]
    assert len(set(found)) == len(salts)


def test_a_key_depends_on_the_policy_of_its_tokens() -> None:
    causal = make_sequence([1, 2])
    calibrated = make_sequence([1, 2], routing=CALIBRATED, prompt_routing=CALIBRATED)
    assert keys(causal, 1) != keys(calibrated, 1)


def test_a_key_of_prompt_tokens_does_not_depend_on_the_policy_of_the_others() -> None:
    one = make_sequence([1, 2, 3, 4], num_prompt=2, prompt_routing=CALIBRATED)
    other = make_sequence([1, 2, 3, 4], num_prompt=4, routing=CAUSAL, prompt_routing=CALIBRATED)
    third = make_sequence([1, 2, 3, 4], num_prompt=2, routing=CALIBRATED, prompt_routing=CALIBRATED)
    assert keys(one, 2)[0] == keys(other, 2)[0] == keys(third, 2)[0]
    assert one.block_keys[1] != other.block_keys[1]
    assert other.block_keys[1] == third.block_keys[1]


def test_where_the_prompt_ends_within_a_block_counts_if_policies_differ() -> None:
    sequences = [
        make_sequence([1, 2, 3, 4], num_prompt=n, prompt_routing=CALIBRATED) for n in (2, 3, 4)
    ]
    assert len({keys(sequence, 2)[1] for sequence in sequences}) == 3
    assert len({sequence.block_keys[0] for sequence in sequences}) == 1


def test_mixed_blocks_agree_only_if_both_policies_agree() -> None:
    policies = [(CAUSAL, CALIBRATED), (CALIBRATED, CAUSAL), (CAUSAL, CAUSAL)]
    found = {
        keys(make_sequence([1, 2], num_prompt=1, routing=r, prompt_routing=p), 1)[0]
        for r, p in policies
    }
    assert len(found) == 3


@pytest.mark.parametrize("num_prompt", [1, 2, 3, 4])
def test_prompt_and_answer_under_one_policy_share_keys(num_prompt: int) -> None:
    prompt = make_sequence([1, 2, 3, 4])
    answer = make_sequence([1, 2, 3, 4], num_prompt=num_prompt)
    assert keys(prompt, 2) == keys(answer, 2)


def test_a_key_depends_on_the_policies_of_the_blocks_before() -> None:
    one = make_sequence([1, 2, 3, 4], num_prompt=2, prompt_routing=CALIBRATED)
    other = make_sequence([1, 2, 3, 4], num_prompt=2)
    assert keys(one, 2)[1] != keys(other, 2)[1]
