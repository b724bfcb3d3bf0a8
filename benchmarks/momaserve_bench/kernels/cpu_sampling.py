"""Cases of drawing tokens, as the engine calls the kernel: with the rows' parameters laid out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from momaserve.runner.cpu_sampler import CpuSampler
from momaserve.runner.sampler import CHOICE_CODES, Sampler, SampleRow, uniform
from momaserve.sampling import Distribution
from momaserve.tokens.grammar import Choices, GrammarSpec
from momaserve_bench.kernels.case import EXACT, KERNEL, Case, Contender, Contest, Ready, Sizes

TWIN = "torch float32"
DRAW = 1e-5
"""Share of all weights by which a draw may miss its place: running sums of float32 weights."""


def sampling_cases(sizes: Sizes) -> Iterator[Case]:
    """Words, greedy and drawn, and codes of pictures where there are some."""
    kinds = [(Choices.TEXT, 0.0), (Choices.TEXT, 1.0)]
    if sizes.config.image is not None:
        kinds.append((Choices.IMAGE, 1.0))
    for choices, temperature in kinds:
        for rows in sizes.rows:
            yield _draw_case(sizes, choices, temperature, rows)


def draw_error(logits: Tensor, mask: Tensor, row: SampleRow, token: int) -> float:
    """By how much of all weights a row's random number misses the place of the token drawn.

    Args:
        logits: float32 [V].
        mask: bool [V], ids that may be drawn.
        row: temperature and random number.

    Returns:
        0 for the right token; infinite for one that may not be drawn, or, without temperature,
        is not the best.
    """
    if not mask[token]:
        return float("inf")
    allowed = logits.double().masked_fill(~mask, float("-inf"))
    temperature = row.distribution.temperature
    if temperature == 0:
        return 0.0 if token == int(allowed.argmax()) else float("inf")
    ends = ((allowed - allowed.max()) / temperature).exp().cumsum(0)
    ends /= ends[-1].clone()
    number = uniform(row.seed, row.position)
    begin = float(ends[token - 1]) if token else 0.0
    return max(begin - number, number - float(ends[token]), 0.0)


def _draw_case(sizes: Sizes, choices: Choices, temperature: float, rows: int) -> Case:
    vocab = sizes.config.vocab_size

    def build() -> Contest:
        sampler = Sampler(GrammarSpec.from_config(sizes.config), torch.device("cpu"))
        logits = 3 * torch.randn(rows, vocab, generator=sizes.generator())
        distribution = Distribution(temperature=temperature)
        sample_rows = [
            SampleRow(choices=choices, distribution=distribution, seed=row, position=7)
            for row in range(rows)
        ]
        mask = sampler.masks[CHOICE_CODES[choices]]

        def draw(mine: Sampler | CpuSampler) -> Tensor:
            token_ids, is_finite = mine.sample(logits, sample_rows)
            return torch.where(is_finite, token_ids, -1)

        def error(got: Tensor) -> float:
            if got.shape != (rows,) or bool((got < 0).any()) or bool((got >= vocab).any()):
                return float("inf")
            return max(map(partial(_error, mask), logits, sample_rows, got.tolist()))

        tolerance = DRAW if temperature else EXACT
        contenders = (
            Contender(KERNEL, lambda: Ready(partial(draw, CpuSampler(sampler))), tolerance),
            Contender(TWIN, lambda: Ready(partial(draw, sampler)), tolerance),
        )
        return Contest(contenders, error)

    return Case(
        kernel="sampling.draw",
        what=f"{choices} of {vocab}, temperature {temperature:g}",
        rows=rows,
        flops=0.0,
        num_bytes=4.0 * rows * vocab + vocab,
        state_bytes=0,
        touched_bytes=0,
        held_bytes=40 * rows * vocab,
        build=build,
    )


def _error(mask: Tensor, logits: Tensor, row: SampleRow, token: int) -> float:
    return draw_error(logits, mask, row, token)
