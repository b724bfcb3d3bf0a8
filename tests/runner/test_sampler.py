"""From logits to tokens, against an obvious implementation and against the probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from momaserve.runner.cpu_sampler import CpuSampler
from momaserve.runner.sampler import Sampler, SampleRow, grammar_masks, uniform
from momaserve.sampling import Distribution
from momaserve.tokens.grammar import Choices, GrammarSpec

CPU = torch.device("cpu")
TEXT_ONLY = GrammarSpec(vocab_size=24, bos=0, pad=1, eos=2)
WITH_IMAGES = GrammarSpec(
    vocab_size=24,
    bos=0,
    pad=1,
    eos=2,
    image_first=4,
    image_num_codes=8,
    tokens_per_image=3,
    begin_image=13,
    end_image=12,
)
SHARED_IDS = GrammarSpec(vocab_size=24, bos=2, pad=2, eos=2)
GREEDY = Distribution(temperature=0)


def make_row(
    distribution: Distribution = GREEDY,
    *,
    choices: Choices = Choices.TEXT,
    seed: int = 0,
    position: int = 0,
    bias: tuple[tuple[int, float], ...] = (),
) -> SampleRow:
    return SampleRow(
        choices=choices, distribution=distribution, seed=seed, position=position, bias=bias
    )


def draw(logits: Tensor, rows: Sequence[SampleRow], spec: GrammarSpec = WITH_IMAGES) -> list[int]:
    """Tokens drawn by torch; the compiled sampler must agree."""
    sampler = Sampler(spec, CPU)
    token_ids, is_finite = sampler.sample(logits, rows)
    compiled_ids, compiled_is_finite = CpuSampler(sampler).sample(logits, rows)
    assert compiled_ids.tolist() == token_ids.tolist()
    assert compiled_is_finite.tolist() == is_finite.tolist() == logits.isfinite().all(1).tolist()
    drawn: list[int] = token_ids.tolist()
    return drawn


def normal_logits(rows: int, seed: int, spec: GrammarSpec = WITH_IMAGES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, spec.vocab_size, generator=generator)


def tied_logits(rows: int, seed: int, vocab_size: int) -> Tensor:
    """Few levels, so that most ids tie with others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (rows, vocab_size), generator=generator).float()


def slow_candidates(
    logits: Sequence[float], row: SampleRow, spec: GrammarSpec = WITH_IMAGES
) -> dict[int, float]:
    """Probabilities of all ids that may be drawn: temperature, top-k, top-p, min-p, in order."""
    scores = {i: x for i, x in enumerate(logits) if spec.allows(row.choices, i)}
    for token, value in row.bias:
        if token in scores:
            scores[token] += value
    best_first = sorted(scores, key=lambda i: (-scores[i], i))
    if row.distribution.temperature == 0:
        return {best_first[0]: 1.0}
    if row.distribution.top_k:
        best_first = best_first[: row.distribution.top_k]
    best = scores[best_first[0]]
    weights = [math.exp((scores[i] - best) / row.distribution.temperature) for i in best_first]
    probabilities = [weight / sum(weights) for weight in weights]
    if row.distribution.top_p < 1:
        kept, before = 0, 0.0
        while kept < len(best_first) and before < row.distribution.top_p:
            before += probabilities[kept]
            kept += 1
        best_first, probabilities = best_first[:kept], probabilities[:kept]
    floor = row.distribution.min_p * probabilities[0]
    chosen = {i: p for i, p in zip(best_first, probabilities, strict=True) if p >= floor and p > 0}
    return {i: p / sum(chosen.values()) for i, p in chosen.items()}


def draw_many(
    logits: Tensor, distribution: Distribution, count: int, **fields: object
) -> Counter[int]:
    """Tokens drawn at `count` positions from one row of logits [V]."""
    rows = [make_row(distribution, position=i, **fields) for i in range(count)]  # type: ignore[arg-type]
    return Counter(draw(logits.expand(count, -1).clone(), rows))


def assert_frequencies(counts: Counter[int], wanted: dict[int, float]) -> None:
    """Pearson's chi-square, rejected at about 1 in 30000 (Wilson-Hilferty)."""
    total = counts.total()
    assert set(counts) <= set(wanted)
    rare = sum(p for p in wanted.values() if p * total < 5)
    cells = [(counts[i], p * total) for i, p in wanted.items() if p * total >= 5]
    seen_rare = total - sum(seen for seen, _ in cells)
    if rare * total >= 5:
        cells.append((seen_rare, rare * total))
    else:
        assert seen_rare <= rare * total + 5 * math.sqrt(rare * total) + 1
    freedom = max(1, len(cells) - 1)
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 4 * math.sqrt(spread)) ** 3


# --- the random number ---------------------------------------------------------------------


def test_uniform_is_pure() -> None:
    before = [uniform(seed, position) for seed in range(5) for position in range(5)]
    torch.manual_seed(123)
    assert before == [uniform(seed, position) for seed in range(5) for position in range(5)]
    assert len(set(before)) == 25


def test_uniform_never_changes_between_versions() -> None:
    """A seed that a user wrote down must keep its meaning."""
    assert uniform(0, 0) == 0.1715401303266132
    assert uniform(2**63 + 14, 4095) == 0.5092746644284042


@given(st.integers(0, 2**63 + 15), st.integers(0, 2**31))
def test_uniform_is_in_the_unit_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_uniform_is_uniform(along: str) -> None:
    values = [uniform(i, 7) if along == "seeds" else uniform(7, i) for i in range(4000)]
    bins = Counter(int(value * 20) for value in values)
    assert_frequencies(bins, dict.fromkeys(range(20), 1 / 20))


# --- the grammar's masks -------------------------------------------------------------------


@pytest.mark.parametrize("spec", [TEXT_ONLY, WITH_IMAGES, SHARED_IDS])
def test_grammar_masks_are_what_the_grammar_allows(spec: GrammarSpec) -> None:
    masks = grammar_masks(spec)
    assert masks.shape == (len(Choices), spec.vocab_size)
    for row, choices in zip(masks.tolist(), Choices, strict=True):
        assert row == [spec.allows(choices, token) for token in range(spec.vocab_size)]


@pytest.mark.parametrize("choices", Choices)
def test_only_allowed_ids_are_drawn(choices: Choices) -> None:
    for distribution in (GREEDY, Distribution(), Distribution(top_k=3), Distribution(top_p=0.5)):
        rows = [make_row(distribution, choices=choices, position=i) for i in range(200)]
        logits = normal_logits(200, seed=1)
        for token in range(WITH_IMAGES.vocab_size):  # the forbidden ones look best
            if not WITH_IMAGES.allows(choices, token):
                logits[:, token] += 50
        for token in draw(logits, rows):
            assert WITH_IMAGES.allows(choices, token)


# --- the draw ------------------------------------------------------------------------------


def test_logits_are_not_changed() -> None:
    logits = normal_logits(2, seed=2)
    before = logits.clone()
    rows = [make_row(bias=((5, 3.0),)), make_row(Distribution(top_k=2), bias=((6, -math.inf),))]
    draw(logits, rows)
    assert torch.equal(logits, before)


def test_codes_are_drawn_from_their_own_columns_alike() -> None:
    ways = (GREEDY, Distribution(), Distribution(temperature=0.7, top_k=3), Distribution(top_p=0.6))
    rows = [make_row(ways[i % 4], choices=Choices.IMAGE, seed=i, position=i) for i in range(40)]
    logits = normal_logits(40, seed=8)
    whole = draw(logits, rows)
    for sampler in (Sampler(WITH_IMAGES, CPU), CpuSampler(Sampler(WITH_IMAGES, CPU))):
        token_ids, _ = sampler.sample(logits[:, 4:12], rows, 4)
        assert token_ids.tolist() == whole


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("distribution", [GREEDY, Distribution(), Distribution(top_k=3)])
def test_a_row_that_is_not_finite_is_named_and_drawn_alike(
    distribution: Distribution, broken: float
) -> None:
    logits = normal_logits(3, seed=3)
    rows = [make_row(distribution, seed=i) for i in range(3)]
    whole = draw(logits, rows)
    logits[1, 5] = broken  # an id that is masked
    drawn = draw(logits, rows)
    assert (drawn[0], drawn[2]) == (whole[0], whole[2])
    assert WITH_IMAGES.allows(Choices.TEXT, drawn[1])


def test_greedy_takes_the_best_and_the_lower_of_equals() -> None:
    logits = torch.zeros(3, 24)
    logits[0, [20, 17]] = 4.0
    logits[1, 5] = 9.0  # an image id, masked; all text ids tie
    logits[2, 22] = 1e-6
    assert draw(logits, [make_row()] * 3) == [17, 2, 22]
    logits = torch.full((2, 24), -3.0)
    logits[0, [18, 21]] = -0.5
    logits[1, 19], logits[1, 20] = -0.0, 0.0  # equal, whatever their bits
    assert draw(logits, [make_row()] * 2) == [18, 19]


DISTRIBUTIONS = [
    Distribution(),
    Distribution(temperature=0.3),
    Distribution(temperature=3.0),
    Distribution(top_k=1),
    Distribution(top_k=4),
    Distribution(top_k=100),
    Distribution(top_p=0.6),
    Distribution(top_p=1e-9),
    Distribution(min_p=0.3),
    Distribution(min_p=1.0),
    Distribution(temperature=0.7, top_k=9, top_p=0.8, min_p=0.05),
    Distribution(temperature=1.5, top_p=0.9, min_p=0.2),
]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_frequencies_match_the_probabilities(distribution: Distribution) -> None:
    for seed in (3, 4):
        logits = normal_logits(1, seed)[0]
        wanted = slow_candidates(logits.tolist(), make_row(distribution))
        assert_frequencies(draw_many(logits, distribution, 2000, seed=seed), wanted)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_frequencies_match_where_ids_tie(distribution: Distribution) -> None:
    """Also that ties at the edge of top-k and top-p go to the lower id."""
    logits = tied_logits(1, 5, 24)[0]
    wanted = slow_candidates(logits.tolist(), make_row(distribution))
    assert_frequencies(draw_many(logits, distribution, 2000), wanted)


def test_frequencies_over_seeds_match_too() -> None:
    logits = normal_logits(1, seed=6)
    rows = [make_row(Distribution(), seed=seed, position=11) for seed in range(3000)]
    drawn = Counter(draw(logits.expand(3000, -1).clone(), rows))
    assert_frequencies(drawn, slow_candidates(logits[0].tolist(), rows[0]))


def test_bias_moves_the_odds() -> None:
    logits = normal_logits(1, seed=7)[0]
    bias = ((17, 1.5), (18, -2.0), (19, -math.inf), (5, 100.0))  # 5 is an image id: masked
    wanted = slow_candidates(logits.tolist(), make_row(Distribution(), bias=bias))
    assert 5 not in wanted
    assert wanted.get(19, 0.0) == 0
    assert_frequencies(draw_many(logits, Distribution(), 2000, bias=bias), wanted)


@pytest.mark.parametrize("distribution", [GREEDY, *DISTRIBUTIONS], ids=str)
def test_a_ban_holds_against_any_odds(distribution: Distribution) -> None:
    logits = torch.full((24,), -3.0)
    logits[17] = 80.0
    drawn = draw_many(logits, distribution, 100, bias=((17, -math.inf), (17, 100.0)))
    assert 17 not in drawn


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_tiny_temperature_is_greedy(temperature: float, changes: dict[str, float]) -> None:
    distribution = Distribution(temperature=temperature, **changes)  # type: ignore[arg-type]
    logits = normal_logits(1, seed=8)[0] * 100
    wanted = slow_candidates(logits.tolist(), make_row(GREEDY))
    assert set(draw_many(logits, distribution, 50)) == set(wanted)


def test_a_tiny_temperature_keeps_equals_equal() -> None:
    logits = torch.zeros(24)
    logits[[17, 20]] = 1.0
    drawn = draw_many(logits, Distribution(temperature=1e-300), 1000)
    assert_frequencies(drawn, {17: 0.5, 20: 0.5})


def test_a_huge_temperature_is_nearly_uniform() -> None:
    logits = normal_logits(1, seed=9)[0] * 0.01
    allowed = [i for i in range(24) if WITH_IMAGES.allows(Choices.TEXT, i)]
    drawn = draw_many(logits, Distribution(temperature=100.0), 3000)
    assert_frequencies(drawn, dict.fromkeys(allowed, 1 / len(allowed)))


def test_extreme_logits_overflow_nothing() -> None:
    logits = torch.full((24,), -3e38)
    logits[20] = 3e38
    for distribution in DISTRIBUTIONS:
        assert set(draw_many(logits, distribution, 20)) == {20}


def test_any_top_k_is_taken() -> None:
    """What no tensor can hold is as good as no limit; it must not end a step of many requests."""
    logits = normal_logits(1, seed=10)[0]
    wanted = slow_candidates(logits.tolist(), make_row(Distribution()))
    assert_frequencies(draw_many(logits, Distribution(top_k=2**70), 1000), wanted)


# --- mates ---------------------------------------------------------------------------------

distributions = st.builds(
    Distribution,
    temperature=st.sampled_from([0.0, 0.2, 1.0, 5.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.3, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
)
sample_rows = st.builds(
    make_row,
    distributions,
    choices=st.sampled_from(Choices),
    seed=st.integers(0, 2**63),
    position=st.integers(0, 5000),
    bias=st.sampled_from([(), ((400, 2.0),), ((2, -math.inf), (300, -1.0))]),
)
LARGE = GrammarSpec(
    vocab_size=700,
    bos=0,
    pad=1,
    eos=2,
    image_first=3,
    image_num_codes=200,
    tokens_per_image=4,
    begin_image=204,
    end_image=203,
)


@given(st.lists(sample_rows, min_size=2, max_size=12), st.integers(0, 1000), st.booleans())
def test_a_row_does_not_depend_on_its_mates(
    rows: list[SampleRow], seed: int, has_ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(rows), LARGE.vocab_size, generator=generator)
    if has_ties:  # as bfloat16 heads make them
        logits = logits.round()
    alone = [draw(logits[i : i + 1], [row], LARGE)[0] for i, row in enumerate(rows)]
    assert draw(logits, rows, LARGE) == alone
    assert draw(logits.flip(0), rows[::-1], LARGE) == alone[::-1]


@given(sample_rows, st.integers(0, 1000))
def test_what_is_drawn_may_be_drawn(row: SampleRow, seed: int) -> None:
    logits = tied_logits(1, seed, LARGE.vocab_size)
    (token,) = draw(logits, [row], LARGE)
    assert token in slow_candidates(logits[0].tolist(), row, LARGE)
