"""Penalties against an obvious implementation, row by row and id by id."""

from __future__ import annotations

import math
import struct
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from momaserve.runner.cpu_sampler import CpuSampler
from momaserve.runner.sampler import Penalties, Sampler, SampleRow
from momaserve.sampling import Distribution
from momaserve.tokens.grammar import Choices
from tests.runner.test_sampler import (
    CPU,
    DISTRIBUTIONS,
    GREEDY,
    WITH_IMAGES,
    assert_frequencies,
    normal_logits,
    slow_candidates,
)

VOCAB_SIZE = WITH_IMAGES.vocab_size
TEXT_IDS = [i for i in range(VOCAB_SIZE) if WITH_IMAGES.allows(Choices.TEXT, i)]
Bias = tuple[tuple[int, float], ...]


def make_penalties(
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    prompt: tuple[int, ...] = (),
    answer: tuple[int, ...] = (),
) -> Penalties:
    return Penalties(
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        prompt_ids=frozenset(prompt),
        output_counts=Counter(answer),
    )


def make_row(
    distribution: Distribution = GREEDY,
    *,
    penalties: Penalties | None = None,
    bias: Bias = (),
    choices: Choices = Choices.TEXT,
    seed: int = 0,
    position: int = 0,
) -> SampleRow:
    return SampleRow(
        choices=choices,
        distribution=distribution,
        seed=seed,
        position=position,
        bias=bias,
        penalties=penalties,
    )


def float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def slow_scores(logits: list[float], row: SampleRow) -> list[float]:
    """Mask, bias, penalties: what temperature and the filters work on."""
    scores = [x if WITH_IMAGES.allows(row.choices, i) else -math.inf for i, x in enumerate(logits)]
    for token, value in row.bias:
        scores[token] = float32(scores[token] + value)
    penalties = row.penalties
    if penalties is None:
        return scores
    for token in {*penalties.prompt_ids, *penalties.output_counts}:
        if scores[token] > 0:
            scores[token] = float32(scores[token] / penalties.repetition)
        else:
            scores[token] = float32(scores[token] * penalties.repetition)
    for token, count in penalties.output_counts.items():
        scores[token] = float32(
            scores[token] - float32(penalties.presence + penalties.frequency * count)
        )
    return scores


def sample(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    sampler = Sampler(WITH_IMAGES, CPU)
    drawn: list[int] = sampler.sample(logits, rows)[0].tolist()
    assert CpuSampler(sampler).sample(logits, rows)[0].tolist() == drawn
    return drawn


def best(logits: dict[int, float], row: SampleRow) -> int:
    """The greedy token where the other text ids have a logit of -50."""
    values = torch.full((1, VOCAB_SIZE), -50.0)
    for token, value in logits.items():
        values[0, token] = value
    return sample(values, [row])[0]


# --- what each penalty does ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["prompt", "answer"])
def test_repetition_divides_positive_and_multiplies_negative_logits(where: str) -> None:
    def chosen(own: float, rival: float, repetition: float) -> int:
        penalties = make_penalties(repetition, **{where: (17,)})  # type: ignore[arg-type]
        return best({17: own, 20: rival}, make_row(penalties=penalties))

    assert chosen(4.0, 2.1, 2.0) == 20  # 4 / 2
    assert chosen(4.0, 1.9, 2.0) == 17
    assert chosen(-1.0, -1.9, 2.0) == 20  # -1 * 2
    assert chosen(-1.0, -2.1, 2.0) == 17
    assert chosen(4.0, 7.9, 0.5) == 17  # below 1 it encourages
    assert chosen(-4.0, -2.1, 0.5) == 17


def test_repetition_counts_an_id_once() -> None:
    penalties = make_penalties(2.0, prompt=(17,), answer=(17, 17, 17))
    assert best({17: 4.0, 20: 1.9}, make_row(penalties=penalties)) == 17


def test_presence_is_subtracted_once_and_only_for_the_answer() -> None:
    penalties = make_penalties(presence=1.5, prompt=(17,), answer=(20, 20, 20))
    row = make_row(penalties=penalties)
    assert best({20: 3.0, 18: 1.4}, row) == 20
    assert best({20: 3.0, 18: 1.6}, row) == 18
    assert best({17: 3.0, 18: 2.9}, row) == 17  # of the prompt


def test_frequency_is_subtracted_for_each_occurrence_in_the_answer() -> None:
    penalties = make_penalties(frequency=0.5, prompt=(17,), answer=(20, 20, 20))
    row = make_row(penalties=penalties)
    assert best({20: 3.0, 18: 1.4}, row) == 20
    assert best({20: 3.0, 18: 1.6}, row) == 18
    assert best({17: 3.0, 18: 2.9}, row) == 17


def test_negative_additive_penalties_encourage() -> None:
    penalties = make_penalties(presence=-1.0, frequency=-0.25, answer=(20, 20))
    assert best({20: 1.6, 18: 3.0}, make_row(penalties=penalties)) == 20
    assert best({20: 1.4, 18: 3.0}, make_row(penalties=penalties)) == 18


def test_biases_come_before_penalties() -> None:
    penalties = make_penalties(2.0, prompt=(17,))
    row = make_row(penalties=penalties, bias=((17, 3.0),))
    assert best({17: 1.0, 20: 1.9}, row) == 17  # (1 + 3) / 2
    assert best({17: 1.0, 20: 2.1}, row) == 20


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_penalties_come_before_temperature_and_filters(distribution: Distribution) -> None:
    penalties = make_penalties(1.5, 0.5, 0.25, prompt=(15, 17, 20), answer=(17, 22, 22))
    logits = normal_logits(1, seed=21)[0]
    rows = [make_row(distribution, penalties=penalties, position=i) for i in range(2000)]
    drawn = Counter(sample(logits.expand(len(rows), -1).clone(), rows))
    plain = make_row(distribution)
    assert_frequencies(drawn, slow_candidates(slow_scores(logits.tolist(), rows[0]), plain))


# --- what must not happen ------------------------------------------------------------------

EXTREMES = [
    make_penalties(5e-324, 2.0, 2.0, prompt=tuple(TEXT_IDS), answer=(17, 20)),
    make_penalties(1e-30, -2.0, -2.0, prompt=(17,), answer=(20,) * 4000),
    make_penalties(10.0, 2.0, 2.0, prompt=(17, 20), answer=(17,) * 4000),
]


@pytest.mark.parametrize("penalties", EXTREMES)
@pytest.mark.parametrize("distribution", [GREEDY, *DISTRIBUTIONS], ids=str)
def test_masked_and_banned_ids_stay_away(penalties: Penalties, distribution: Distribution) -> None:
    logits = torch.tensor([3e38, -3e38, 0.0, -0.0, 1e-40, 5.0] * 4).expand(50, -1).clone()
    bias = ((17, -math.inf), (23, -math.inf))
    rows = [make_row(distribution, penalties=penalties, bias=bias, position=i) for i in range(50)]
    drawn = set(sample(logits, rows))
    assert drawn <= set(TEXT_IDS) - {17, 23}


@pytest.mark.parametrize("distribution", [GREEDY, *DISTRIBUTIONS], ids=str)
def test_bans_that_leave_nothing_are_void(distribution: Distribution) -> None:
    """A small vocabulary whose every id ends the answer, and an answer that may not end yet."""
    bias = tuple((i, -math.inf) for i in range(VOCAB_SIZE))
    penalties = make_penalties(1.5, prompt=(17,), answer=(20,))
    rows = [make_row(distribution, penalties=penalties, bias=bias, position=i) for i in range(50)]
    assert set(sample(normal_logits(50, seed=22), rows)) <= set(TEXT_IDS)


def test_logits_are_not_changed() -> None:
    logits = normal_logits(1, seed=23)
    before = logits.clone()
    sample(logits, [make_row(penalties=make_penalties(2.0, 1.0, 1.0, prompt=(17,), answer=(20,)))])
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "penalties", [make_penalties(2.0, 1.0, 1.0), make_penalties(prompt=(17,), answer=(20, 20))]
)
def test_nothing_to_penalise_is_no_penalty(penalties: Penalties) -> None:
    logits = normal_logits(40, seed=24)
    rows = [make_row(Distribution(), position=i) for i in range(40)]
    penalised = [make_row(Distribution(), position=i, penalties=penalties) for i in range(40)]
    assert sample(logits, penalised) == sample(logits, rows)


# --- any rows together ---------------------------------------------------------------------

ids = st.integers(0, VOCAB_SIZE - 1)
penalties_of_rows = st.builds(
    make_penalties,
    st.sampled_from([1.0, 1.0, 1.2, 0.7, 2.0, 10.0, 1e-3]),
    st.sampled_from([0.0, 0.0, 0.5, -1.25, 2.0]),
    st.sampled_from([0.0, 0.0, 0.25, -0.5, 2.0]),
    st.lists(ids, max_size=8).map(tuple),
    st.lists(ids, max_size=8).map(tuple),
)
sample_rows = st.builds(
    make_row,
    st.sampled_from([GREEDY, Distribution(), *DISTRIBUTIONS]),
    penalties=st.none() | penalties_of_rows,
    bias=st.sampled_from([(), ((17, 2.0),), ((2, -math.inf), (20, -1.0)), ((17, -math.inf),)]),
    choices=st.sampled_from(Choices),
    seed=st.integers(0, 2**63),
    position=st.integers(0, 5000),
)


@given(st.lists(sample_rows, min_size=1, max_size=10), st.integers(0, 1000), st.booleans())
def test_each_row_is_drawn_from_its_own_penalised_scores(
    rows: list[SampleRow], seed: int, has_ties: bool
) -> None:
    logits = normal_logits(len(rows), seed)
    if has_ties:
        logits = logits.round()
    scores = torch.tensor(
        [slow_scores(x, row) for x, row in zip(logits.tolist(), rows, strict=True)]
    ).clamp_min(-1e30)  # what is banned, in numbers that logits may have
    plain = [
        make_row(r.distribution, choices=r.choices, seed=r.seed, position=r.position) for r in rows
    ]
    wanted = [sample(scores[i : i + 1], [row])[0] for i, row in enumerate(plain)]
    assert sample(logits, rows) == wanted
