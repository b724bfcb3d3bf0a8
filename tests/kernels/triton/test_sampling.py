"""The sampling kernels draw the ids that the engine's sampler draws, from the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from momaserve.kernels import reference_sampling
from momaserve.kernels.triton import sampling
from momaserve.runner.sampler import CHOICE_CODES, Sampler, SampleRow, uniform
from momaserve.sampling import Distribution
from momaserve.tokens.grammar import Choices, GrammarSpec
from tests.kernels.triton.device import DEVICE, randn

SPEC = GrammarSpec(
    vocab_size=50,
    bos=0,
    pad=1,
    eos=2,
    image_first=4,
    image_num_codes=20,
    tokens_per_image=3,
    begin_image=25,
    end_image=24,
)
SAMPLER = Sampler(SPEC, torch.device(DEVICE))
DISTRIBUTIONS = [
    Distribution(temperature=0),
    Distribution(),
    Distribution(temperature=1e-200),
    Distribution(temperature=0.5, min_p=0.1),
    Distribution(top_k=1),
    Distribution(top_k=7, temperature=2.0),
    Distribution(top_k=40, top_p=0.8),
    Distribution(top_k=1000),
    Distribution(top_p=0.5, temperature=3.0),
    Distribution(top_p=0.95, min_p=0.05),
    Distribution(top_p=1e-9),
    Distribution(top_k=5, top_p=0.9, min_p=1.0),
]


@pytest.fixture(params=[32, 16], ids=["listed", "not listed"], autouse=True)
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several slices, and rows that fit into the list or do not."""
    monkeypatch.setattr(sampling, "SLICE", 32)
    monkeypatch.setattr(sampling, "LISTED", request.param)
    yield


def draw(
    logits: Tensor, rows: list[SampleRow], bias: Tensor | None = None
) -> tuple[list[int], list[bool]]:
    """By the kernels; their twin must agree."""

    def floats(values: Iterator[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float64, device=DEVICE)

    def integers(values: Iterator[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=DEVICE)

    arguments = (
        logits,
        SAMPLER.masks,
        integers(CHOICE_CODES[row.choices] for row in rows),
        floats(row.distribution.temperature for row in rows),
        integers(row.distribution.top_k for row in rows),
        floats(row.distribution.top_p for row in rows),
        floats(row.distribution.min_p for row in rows),
        floats(uniform(row.seed, row.position) for row in rows),
    )
    token_ids, is_finite = sampling.draw(*arguments, bias=bias)
    twin_ids, twin_is_finite = reference_sampling.draw(*arguments, bias=bias)
    assert token_ids.tolist() == twin_ids.tolist()
    assert is_finite.tolist() == twin_is_finite.tolist()
    return token_ids.tolist(), is_finite.tolist()


def make_rows(seed: int) -> list[SampleRow]:
    """Every distribution once, under changing masks."""
    kinds = list(Choices)
    return [
        SampleRow(
            choices=kinds[(seed + place) % len(kinds)],
            distribution=distribution,
            seed=seed,
            position=place,
        )
        for place, distribution in enumerate(DISTRIBUTIONS)
    ]


@pytest.mark.parametrize(("seed", "is_tied"), [(0, False), (1, True)])
def test_ids_are_those_of_the_engines_sampler(seed: int, is_tied: bool) -> None:
    rows = make_rows(seed)
    logits = 2 * randn(len(rows), SPEC.vocab_size, seed=seed)
    if is_tied:
        logits = (logits / 2).round().clamp(-2, 2)  # few levels: most ids tie with others
    wanted, _ = SAMPLER.sample(logits, rows)
    token_ids, _ = draw(logits, rows)
    assert token_ids == wanted.tolist()


def test_every_id_of_a_tie_is_drawn_in_its_turn() -> None:
    """Equal logits: the n-th of N kept ids is drawn by numbers from n / N to (n + 1) / N."""
    kept = Distribution(top_k=3)
    rows = [
        SampleRow(choices=Choices.TEXT, distribution=kept, seed=0, position=p) for p in range(5)
    ]
    token_ids, _ = draw(torch.zeros(5, SPEC.vocab_size, device=DEVICE), rows)
    first = [i for i in range(SPEC.vocab_size) if SPEC.allows(Choices.TEXT, i)][:3]
    assert token_ids == [first[int(3 * uniform(0, p))] for p in range(5)]
    assert len(set(token_ids)) > 1


def test_biases_count_unless_they_ban_everything() -> None:
    some = [0, 1, 6, 9]
    rows = [make_rows(0)[place] for place in some]
    logits = randn(len(rows), SPEC.vocab_size, seed=3)
    bias = torch.zeros_like(logits)
    bias[:, 30] = 5.5
    bias[:, 40:] = -torch.inf
    bias[2] = -torch.inf
    biased = [
        SampleRow(
            choices=row.choices,
            distribution=row.distribution,
            seed=row.seed,
            position=row.position,
            bias=tuple(enumerate(values)),
        )
        for row, values in zip(rows, bias.tolist(), strict=True)
    ]
    wanted, _ = SAMPLER.sample(logits, biased)
    token_ids, _ = draw(logits, rows, bias)
    assert token_ids == wanted.tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_is_told_and_leaves_the_others_alone(value: float) -> None:
    rows = [make_rows(0)[place] for place in (1, 5, 3)]
    logits = randn(3, SPEC.vocab_size, seed=4)
    whole, _ = draw(logits, rows)
    logits[1, 45] = value
    token_ids, is_finite = draw(logits, rows)
    assert is_finite == [True, False, True]
    assert [token_ids[0], token_ids[2]] == [whole[0], whole[2]]
    assert SPEC.allows(rows[1].choices, token_ids[1])


def test_a_part_of_the_vocabulary_is_drawn_from_alone() -> None:
    """As in steps that draw pictures only: columns and masks of a range of ids."""
    rows = [row for row in make_rows(2) if row.choices is Choices.IMAGE]
    logits = randn(len(rows), SPEC.vocab_size, seed=5)
    ids = SPEC.image_ids
    wanted, _ = SAMPLER.sample(logits, rows)
    count = len(rows)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=DEVICE)

    how = [row.distribution for row in rows]
    token_ids, _ = sampling.draw(
        logits[:, ids.start : ids.stop],
        SAMPLER.masks[:, ids.start : ids.stop],
        torch.full((count,), CHOICE_CODES[Choices.IMAGE], dtype=torch.int32, device=DEVICE),
        column([d.temperature for d in how]),
        torch.tensor([d.top_k for d in how], dtype=torch.int32, device=DEVICE),
        column([d.top_p for d in how]),
        column([d.min_p for d in how]),
        column([uniform(row.seed, row.position) for row in rows]),
    )
    assert (token_ids + ids.start).tolist() == wanted.tolist()


def test_no_rows_and_wrong_shapes() -> None:
    def call(logits: Tensor, masks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        def wide() -> Tensor:
            return torch.ones(count, dtype=torch.float64, device=DEVICE)

        whole = torch.zeros(count, dtype=torch.int32, device=DEVICE)
        return sampling.draw(logits, masks, whole, wide(), whole, wide(), wide(), wide())

    logits = randn(2, SPEC.vocab_size, seed=6)
    token_ids, is_finite = call(logits[:0], SAMPLER.masks, 0)
    assert len(token_ids) == len(is_finite) == 0
    with pytest.raises(ValueError, match=r"masks must be bool \[C, 50\]"):
        call(logits, SAMPLER.masks[:, 1:], 2)
    with pytest.raises(ValueError, match="temperature must be|choices must be"):
        call(logits, SAMPLER.masks, 3)
    with pytest.raises(ValueError, match="logits must be float32"):
        call(logits.double(), SAMPLER.masks, 2)
    with pytest.raises(ValueError, match="between 1 and 1048576 columns, got 1048577"):
        call(torch.empty(1, sampling.MAX_VOCAB + 1, device=DEVICE), SAMPLER.masks, 1)
