"""Sampling on a CPU: plain rows by a compiled kernel, the others by torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from momaserve.kernels.cpu import sampling
from momaserve.runner.sampler import CHOICE_CODES, Sampler, SampleRow, uniform


class CpuSampler:
    """Draws one token per row; each row's way depends on its own parameters alone."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._masks = sampler.masks.numpy()

    def sample(
        self, logits: Tensor, rows: Sequence[SampleRow], first_id: int = 0
    ) -> tuple[Tensor, Tensor]:
        """As `Sampler.sample`."""
        is_plain = [_is_plain(row) for row in rows]
        if not any(is_plain):
            return self._sampler.sample(logits, rows, first_id)
        token_ids = torch.empty(len(rows), dtype=torch.int64)
        is_finite = torch.empty(len(rows), dtype=torch.bool)
        plain = [i for i, mine in enumerate(is_plain) if mine]
        biases = [rows[i].bias for i in plain]
        sampling.draw(
            logits.contiguous().numpy(),
            np.array(plain),
            self._masks[:, first_id : first_id + logits.shape[1]],
            np.array([CHOICE_CODES[rows[i].choices] for i in plain]),
            np.array([rows[i].distribution.temperature for i in plain], np.float64),
            np.array([rows[i].distribution.min_p for i in plain], np.float64),
            np.array([uniform(rows[i].seed, rows[i].position) for i in plain]),
            np.cumsum([0, *map(len, biases)]),
            np.array([token for bias in biases for token, _ in bias], np.int64),
            np.array([value for bias in biases for _, value in bias], np.float32),
            token_ids.numpy(),
            is_finite.numpy(),
        )
        token_ids += first_id
        if len(plain) < len(rows):
            index = torch.tensor([i for i, mine in enumerate(is_plain) if not mine])
            others = [rows[i] for i in index.tolist()]
            token_ids[index], is_finite[index] = self._sampler.sample(
                logits[index], others, first_id
            )
        return token_ids, is_finite


def _is_plain(row: SampleRow) -> bool:
    """Whether no penalty changes the row, and nothing must be sorted to draw from it."""
    distribution = row.distribution
    is_sorted = distribution.temperature > 0 and (distribution.top_k or distribution.top_p < 1)
    return row.penalties is None and not is_sorted
