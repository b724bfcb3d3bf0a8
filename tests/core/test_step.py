"""Exact examples of how a step's tokens are divided."""

from __future__ import annotations

import pytest

from momaserve.core.plan import OWN, PlannedSequence, StepPlan
from momaserve.core.step import StepDraft, num_missing, prompt_must_be_whole, share_budget, split
from momaserve.request import Request
from tests.core.factory import make_request


def running(name: str, num_tokens: int, num_computed: int = 0, *, whole: bool = False) -> Request:
    request = make_request(name, num_tokens, whole=whole)
    request.sequence.num_computed_tokens = num_computed
    return request


def guided(num_tokens: int, num_computed: int, *companions: int, whole: bool = False) -> Request:
    """A request in its picture; `companions` are the computed tokens of each one's 2."""
    request = make_request(
        "g", num_tokens, num_companions=len(companions), in_picture=True, whole=whole
    )
    request.sequence.num_computed_tokens = num_computed
    for companion, computed in zip(request.companions, companions, strict=True):
        companion.num_computed_tokens = computed
    return request


def test_what_is_missing_includes_what_is_being_sampled() -> None:
    request = running("a", 6, 4)
    assert num_missing(request) == 2
    request.sequence.num_computed_tokens = 6
    request.num_pending_tokens = 1
    assert num_missing(request) == 1


def test_what_is_missing_includes_companions() -> None:
    request = guided(6, 5, 0, 1)
    assert num_missing(request) == 1 + 2 + 1
    request.num_pending_tokens = 1
    assert num_missing(request) == 2 + 3 + 2


def shares(requests: list[Request], budget: int) -> dict[str, int]:
    missing = [(request, num_missing(request)) for request in requests]
    shared = share_budget(missing, budget)
    return {r.request_id: share for r, share in zip(requests, shared, strict=True)}


def test_all_get_what_they_miss_if_there_is_enough() -> None:
    requests = [running("a", 9), running("b", 5, 4), running("c", 3)]
    assert shares(requests, 13) == {"a": 9, "b": 1, "c": 3}


def test_fewest_missing_tokens_first_and_one_is_kept_for_each() -> None:
    requests = [running("a", 9), running("b", 5, 4), running("c", 3)]
    assert shares(requests, 12) == {"b": 1, "c": 3, "a": 8}
    assert shares(requests, 4) == {"b": 1, "c": 2, "a": 1}
    assert shares(requests, 3) == {"b": 1, "c": 1, "a": 1}


def test_one_token_is_kept_for_each_sequence_companions_included() -> None:
    requests = [running("a", 3), guided(9, 0, 0)]
    assert shares(requests, 5) == {"a": 3, "g": 2}
    assert shares(requests, 3) == {"a": 1, "g": 2}


def test_one_token_is_kept_for_companions_that_are_not_there_yet() -> None:
    other = make_request("g", 9, num_companions=2)
    assert shares([running("a", 5), other], 6) == {"a": 3, "g": 3}


@pytest.mark.parametrize(("share", "counts"), [(1, [1]), (4, [4]), (6, [6]), (9, [6])])
def test_a_request_without_companions_takes_its_share(share: int, counts: list[int]) -> None:
    assert split(running("a", 10, 4), share) == counts


@pytest.mark.parametrize(
    ("share", "counts"),
    [(1, [1, 0]), (2, [2, 0]), (3, [3, 0]), (4, [3, 1]), (5, [3, 1]), (6, [4, 2]), (9, [4, 2])],
)
def test_last_tokens_are_computed_together(share: int, counts: list[int]) -> None:
    assert split(guided(4, 0, 0), share) == counts


@pytest.mark.parametrize(("share", "counts"), [(2, None), (3, [1, 1, 1]), (4, [1, 1, 1])])
def test_last_tokens_wait_for_room_for_all_of_them(share: int, counts: list[int] | None) -> None:
    assert split(guided(4, 3, 1, 1), share) == counts


@pytest.mark.parametrize(("share", "counts"), [(1, None), (5, None), (6, [6]), (7, [6])])
def test_an_expert_choice_prompt_is_whole_or_nothing(share: int, counts: list[int] | None) -> None:
    request = running("w", 6, whole=True)
    assert prompt_must_be_whole(request)
    assert split(request, share) == counts


def test_what_follows_an_expert_choice_prompt_may_come_later() -> None:
    request = make_request("w", 6, whole=True, forced=[1, 2])
    assert split(request, 7) == [7]
    request.sequence.num_computed_tokens = 7
    assert split(request, 1) == [1]


@pytest.mark.parametrize(("share", "counts"), [(6, None), (7, None), (8, [6, 2])])
def test_an_expert_choice_prompt_and_its_companion_s_come_together(
    share: int, counts: list[int] | None
) -> None:
    assert split(guided(6, 0, 0, whole=True), share) == counts


def test_a_draft_becomes_a_plan() -> None:
    draft = StepDraft(10, 10)
    draft.budget -= 4
    draft.sequences += [
        PlannedSequence("a", OWN, 2, 3, [5, 6]),
        PlannedSequence("b", 0, 0, 1, [7]),
    ]
    draft.samples += ["a", "c"]
    draft.forks["c"] = "a"
    plan = draft.plan()
    assert plan.num_tokens == 4
    assert plan.num_new_tokens == {"a": 3}
    assert plan.block_ids("a") == (5, 6)
    with pytest.raises(KeyError):
        plan.block_ids("b")


def test_an_empty_plan_computes_nothing() -> None:
    assert StepPlan() == StepDraft(5, 5).plan()
    assert StepPlan().num_tokens == 0
