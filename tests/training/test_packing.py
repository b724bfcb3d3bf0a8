"""Packed rows: what each token sees, where it stands, and what is learnt."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from momaserve.config import RoutingPolicy
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.training.forward import forward_batch, token_losses
from momaserve.training.packing import PackedRows
from momaserve.training.tasks import Exchange
from tests.models.factory import make_config, make_model
from tests.training.factory import (
    BOS,
    EOS,
    PAD,
    SEP,
    WORDS,
    draw,
    make_packer,
    picture,
    tiny_config,
)

EXCHANGES = [
    Exchange((30,), (*picture(30), EOS)),
    Exchange(picture(31), (31, 32, EOS)),
    Exchange((33, 34), (35, 36, 37, EOS)),
    Exchange((38,), (39, EOS)),
]
CONFIG = make_config(max_position_embeddings=128)  # with depth-routed layers
POLICIES = [RoutingPolicy.THRESHOLD, RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED]


def in_turn(exchanges: Sequence[Exchange]) -> Callable[[], Exchange]:
    endless = cycle(exchanges)
    return lambda: next(endless)


def whole(exchange: Exchange) -> list[int]:
    question = () if exchange.question is None else (*exchange.question, SEP)
    return [BOS, *question, *exchange.answer]


def packed(
    exchanges: Sequence[Exchange], num_rows: int = 2, length: int = 24, config: ModelConfig = CONFIG
) -> PackedRows:
    return make_packer(config).documents(in_turn(exchanges), num_rows, length)


def spans(rows: PackedRows) -> list[tuple[int, int, int]]:
    """(row, start, stop) of each document in the order of their numbers."""
    assert rows.documents is not None
    found = []
    for number in range(int(rows.documents.max()) + 1):
        where = (rows.documents == number).nonzero()
        row = int(where[0, 0])
        assert bool((where[:, 0] == row).all())
        start, stop = int(where[0, 1]), int(where[-1, 1]) + 1
        assert len(where) == stop - start
        found.append((row, start, stop))
    return found


def losses_by_document(
    model: MomaModel, rows: PackedRows, policy: RoutingPolicy
) -> dict[int, list[float]]:
    assert rows.documents is not None
    losses, _ = token_losses(model, rows, forward_batch(model.config, rows, policy))
    numbers = rows.documents.flatten()[rows.targets.flatten() >= 0]
    result: dict[int, list[float]] = {}
    for number, loss in zip(numbers.tolist(), losses.tolist(), strict=True):
        result.setdefault(number, []).append(loss)
    return result


def distance(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


# --- layout --------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "length"), [(1, 16), (2, 24), (3, 50)])
def test_documents_lie_whole_in_their_rows(num_rows: int, length: int) -> None:
    rows = packed(EXCHANGES, num_rows, length)
    assert rows.token_ids.shape == (num_rows, length)
    assert rows.num_tokens == num_rows * length
    drawn = in_turn(EXCHANGES)
    waiting = [whole(drawn()) for _ in range(200)]
    for row, start, stop in spans(rows):
        tokens = rows.token_ids[row, start:stop].tolist()
        while waiting[0] != tokens:  # one that no row had room for any more
            waiting.pop(0)
        waiting.pop(0)
        assert rows.positions[row, start:stop].tolist() == list(range(stop - start))


def test_padding_is_what_no_document_covers() -> None:
    rows = packed(EXCHANGES)
    assert rows.documents is not None
    assert torch.equal(rows.is_padding, rows.documents < 0)
    assert bool((rows.token_ids[rows.is_padding] == PAD).all())
    assert bool(rows.is_padding.any())


def test_eos_is_no_padding_even_where_their_ids_are_one() -> None:
    """Many tokenizers have no pad token but use eos; expert choice must still see it."""
    config = make_config(max_position_embeddings=128, pad_token_id=EOS)
    rows = packed(EXCHANGES, config=config)
    assert rows.documents is not None
    assert torch.equal(rows.is_padding, rows.documents < 0)
    conversation = make_packer(config).conversation(in_turn(EXCHANGES), 40)
    assert not bool(conversation.is_padding.any())


def test_only_answers_are_learnt() -> None:
    rows = packed(EXCHANGES, 3, 40)
    learnt = torch.zeros_like(rows.token_ids, dtype=torch.bool)
    for row, start, stop in spans(rows):
        separator = start + rows.token_ids[row, start:stop].tolist().index(SEP)
        learnt[row, separator : stop - 1] = True
    assert torch.equal(rows.targets >= 0, learnt)
    following = torch.roll(rows.token_ids, -1, dims=1)
    assert torch.equal(rows.targets[learnt], following[learnt])
    assert bool((rows.targets[~learnt] == -100).all())


def test_a_document_longer_than_a_row_is_cut() -> None:
    rows = packed([Exchange((30,), (*WORDS, EOS))], 1, 10)
    assert rows.token_ids[0].tolist() == [BOS, 30, SEP, *WORDS[:7]]
    assert rows.targets[0].tolist() == [-100, -100, *WORDS[:7], -100]


def test_nothing_but_the_picture_is_in_an_unasked_document() -> None:
    rows = packed([Exchange(None, (*picture(30), EOS))], 1, 8)
    assert rows.token_ids[0].tolist() == [BOS, *picture(30), EOS]
    assert rows.targets[0].tolist() == [*picture(30), EOS, -100]


def test_a_conversation_leaves_out_what_nobody_asked() -> None:
    unasked = Exchange(None, (*picture(30), EOS))
    both = make_packer(CONFIG).conversation(in_turn([unasked, EXCHANGES[2]]), 30)
    alone = make_packer(CONFIG).conversation(in_turn([EXCHANGES[2]]), 30)
    assert torch.equal(both.token_ids, alone.token_ids)
    assert torch.equal(both.targets, alone.targets)


def test_a_conversation_is_one_document() -> None:
    rows = make_packer(CONFIG).conversation(in_turn(EXCHANGES), 40)
    endless = [whole(EXCHANGES[0])] + [whole(e)[1:] for e in [*EXCHANGES[1:], *EXCHANGES * 3]]
    tokens = [token for document in endless for token in document][:40]
    assert rows.token_ids.tolist() == [tokens]
    assert rows.positions.tolist() == [list(range(40))]
    assert rows.documents is None
    assert tokens.count(BOS) == 1
    marks = [
        mark
        for i, e in enumerate([*EXCHANGES * 3])
        for mark in [False] * (len(whole(e)) - len(e.answer) - (i > 0)) + [True] * len(e.answer)
    ][:40]
    assert (rows.targets[0] >= 0).tolist() == [*marks[1:], False]


def test_packing_is_deterministic() -> None:
    def drawn(seed: int) -> PackedRows:
        rng = random.Random(seed)
        return make_packer(tiny_config()).documents(lambda: draw(rng), 3, 30)

    assert torch.equal(drawn(5).token_ids, drawn(5).token_ids)
    assert not torch.equal(drawn(5).token_ids, drawn(6).token_ids)


# --- what tokens see -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_documents_never_see_each_other(policy: RoutingPolicy, changed: int) -> None:
    model = make_model(CONFIG, seed=3)
    before = packed(EXCHANGES)
    row, start, stop = spans(before)[changed]
    token_ids = before.token_ids.clone()
    for position in range(start, stop):  # other words and codes, the same marks
        token = int(token_ids[row, position])
        if token in WORDS:
            token_ids[row, position] = WORDS[(token + 5) % len(WORDS)]
        elif 4 <= token < 20:
            token_ids[row, position] = 4 + (token + 3) % 16
    after = replace(before, token_ids=token_ids)
    wanted = losses_by_document(model, before, policy)
    got = losses_by_document(model, after, policy)
    assert len(wanted) >= 4
    assert distance(wanted.pop(changed), got.pop(changed)) > 0.01
    for number, losses in wanted.items():  # only rounding, by how many rows an expert has
        assert distance(losses, got[number]) < 1e-5


def test_expert_choice_over_the_batch_does_let_documents_meet() -> None:
    """Negative control: the test above is able to fail."""
    model = make_model(CONFIG, seed=3)
    before = packed(EXCHANGES)
    row, start, stop = spans(before)[2]
    token_ids = before.token_ids.clone()
    token_ids[row, start + 1 : stop - 1] = 39
    wanted = losses_by_document(model, before, RoutingPolicy.EXPERT_CHOICE)
    after = replace(before, token_ids=token_ids)
    got = losses_by_document(model, after, RoutingPolicy.EXPERT_CHOICE)
    others = [number for number in wanted if number != 2]
    assert max(distance(wanted[number], got[number]) for number in others) > 0.01


@pytest.mark.parametrize("policy", POLICIES)
def test_a_packed_document_is_as_if_it_were_alone(policy: RoutingPolicy) -> None:
    model = make_model(CONFIG, seed=4)
    together = losses_by_document(model, packed(EXCHANGES), policy)
    for number, exchange in enumerate(EXCHANGES):
        length = len(whole(exchange))
        alone = losses_by_document(model, packed([exchange], 1, length), policy)
        assert together[number] == pytest.approx(alone[0], abs=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_conversation_sees_what_came_before_and_nothing_after(policy: RoutingPolicy) -> None:
    model = make_model(CONFIG, seed=5)
    rows = make_packer(CONFIG).conversation(in_turn(EXCHANGES), 40)

    def losses(position: int) -> tuple[Tensor, Tensor]:
        token_ids = rows.token_ids.clone()
        token_ids[0, position] = 39
        changed = replace(rows, token_ids=token_ids)
        found, _ = token_losses(model, changed, forward_batch(CONFIG, changed, policy))
        return found, (rows.targets[0] >= 0).nonzero().squeeze(1)

    plain, where = losses(0)
    plain = token_losses(model, rows, forward_batch(CONFIG, rows, policy))[0]
    for position in (1, 20):
        found, _ = losses(position)
        earlier = where < position
        assert_close(found[earlier], plain[earlier], rtol=0, atol=1e-5)
        assert not torch.allclose(found[~earlier], plain[~earlier], atol=1e-4)


def test_padding_takes_no_expert() -> None:
    """Else padding would count in the shares of expert choice."""
    rows = packed(EXCHANGES[3:], 1, 40)
    longer = packed(EXCHANGES[3:], 1, 40)
    keep = int((~rows.is_padding).sum())
    cut = replace(
        rows,
        token_ids=rows.token_ids[:, :keep],
        targets=rows.targets[:, :keep],
        positions=rows.positions[:, :keep],
        documents=None if rows.documents is None else rows.documents[:, :keep],
        is_padding=rows.is_padding[:, :keep],
    )
    model = make_model(CONFIG, seed=6)
    policy = RoutingPolicy.EXPERT_CHOICE
    assert losses_by_document(model, longer, policy) == losses_by_document(model, cut, policy)
