"""Sampling by kernels; rows with penalties by torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from momaserve.kernels.triton import sampling
from momaserve.runner.sampler import CHOICE_CODES, Sampler, SampleRow, uniform
from momaserve.runner.upload import upload


class GpuSampler:
    """Draws one token per row; each row's way depends on its own parameters alone."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def sample(
        self, logits: Tensor, rows: Sequence[SampleRow], first_id: int = 0
    ) -> tuple[Tensor, Tensor]:
        """As `Sampler.sample`."""
        plain = [i for i, row in enumerate(rows) if row.penalties is None]
        if len(plain) == len(rows):
            return self._draw(logits, rows, first_id)
        penalised = [i for i, row in enumerate(rows) if row.penalties is not None]
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        is_finite = torch.empty(len(rows), dtype=torch.bool, device=logits.device)
        for indices, sample in ((plain, self._draw), (penalised, self._sampler.sample)):
            if indices:
                index = upload(np.array(indices), logits.device)
                some = [rows[i] for i in indices]
                token_ids[index], is_finite[index] = sample(logits[index], some, first_id)
        return token_ids, is_finite

    def _draw(
        self, logits: Tensor, rows: Sequence[SampleRow], first_id: int
    ) -> tuple[Tensor, Tensor]:
        count, width = logits.shape
        padded = -(-count // 4) * 4  # so that every row begins at a multiple of 16 bytes
        wanted = np.zeros((5, padded))
        for i, row in enumerate(rows):
            how = row.distribution
            wanted[:4, i] = how.temperature, how.top_p, how.min_p, uniform(row.seed, row.position)
        integers = wanted[4].view(np.int32)  # all in one copy
        integers[:count] = [CHOICE_CODES[row.choices] for row in rows]
        integers[padded : padded + count] = [min(row.distribution.top_k, width) for row in rows]
        parameters = upload(wanted, logits.device)
        temperature, top_p, min_p, uniforms = parameters[:4, :count].unbind(0)
        choices, top_k = parameters[4].view(torch.int32).view(2, padded)[:, :count].unbind(0)
        token_ids, is_finite = sampling.draw(
            logits, self._sampler.masks[:, first_id : first_id + width], choices, temperature,
            top_k, top_p, min_p, uniforms, bias=_biases(rows, logits),
        )  # fmt: skip
        return token_ids + first_id if first_id else token_ids, is_finite


def _biases(rows: Sequence[SampleRow], logits: Tensor) -> Tensor | None:
    """float32 [S, V], what is added to the logits."""
    entries = [(i, token, value) for i, row in enumerate(rows) for token, value in row.bias]
    if not entries:
        return None
    where, tokens, values = zip(*entries, strict=True)
    index = tuple(upload(np.array(part), logits.device) for part in (where, tokens))
    added = upload(np.array(values, np.float32), logits.device)
    return torch.zeros_like(logits).index_put_(index, added, accumulate=True)
