"""Samples as the rows of one pass: laid end to end, routed as they were served."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.kernels import reference
from momaserve.layers.batch import POLICY_CODES, RoutingPlan
from momaserve.router_lab.shadow.sample import Sample
from momaserve.training.packing import PackedRows


def rows_of(samples: Sequence[Sample]) -> PackedRows:
    """One row without padding; a sample is a document, of which the answer is learnt."""
    ids = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    lengths = [sample.num_tokens for sample in samples]
    positions = np.concatenate([np.arange(length) for length in lengths])
    prompts = np.repeat([sample.num_prompt_tokens for sample in samples], lengths)
    following = np.append(ids[1:], -100)
    # The next token is learnt unless it is still of the prompt, or another sample's first.
    is_learnt = (positions + 1 >= prompts) & (positions + 1 < np.repeat(lengths, lengths))
    documents = np.repeat(np.arange(len(samples)), lengths)
    return PackedRows(
        token_ids=torch.from_numpy(ids)[None],
        targets=torch.from_numpy(np.where(is_learnt, following, -100))[None],
        positions=torch.from_numpy(positions)[None],
        documents=torch.from_numpy(documents)[None],
        is_padding=torch.zeros(1, len(ids), dtype=torch.bool),
    )


def served_plan(samples: Sequence[Sample], device: torch.device) -> RoutingPlan:
    """Every token under the policy that it was served by; expert choice is over its own prompt."""
    codes: list[int] = []
    segments: list[int] = []
    policies: set[RoutingPolicy] = set()
    for number, sample in enumerate(samples):
        num_prompt = sample.num_prompt_tokens
        num_answer = sample.num_tokens - num_prompt
        codes += [POLICY_CODES[sample.prompt_routing]] * num_prompt
        codes += [POLICY_CODES[sample.routing]] * num_answer
        is_whole = sample.prompt_routing is RoutingPolicy.EXPERT_CHOICE
        segments += [number if is_whole else -1] * num_prompt + [-1] * num_answer
        policies |= {sample.prompt_routing, sample.routing}
    return RoutingPlan(
        policies=frozenset(policies),
        policy=torch.tensor(codes, dtype=torch.int8, device=device),
        segments=torch.tensor(segments, dtype=torch.int64, device=device),
        num_segments=len(samples),
    )


class SampleAttention:
    """Causal attention of samples that lie end to end, each blind to the others.

    What `PackedAttention` computes, without its mask of all pairs of tokens, which would grow
    with the square of the context.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._lengths = [sample.num_tokens for sample in samples]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, taken: Tensor | None) -> Tensor:
        """q [T, H, K], k and v [T, G, K] -> [T, H, K]; zero for tokens that a layer skips."""
        out = torch.zeros_like(q)
        start = 0
        for length in self._lengths:
            index = torch.arange(start, start + length, device=q.device)
            start += length
            if taken is not None:
                index = index[taken[index]]
            if len(index):
                mine = [x[index].unsqueeze(0) for x in (q, k, v)]
                found = reference.attend(mine[0], mine[1], mine[2], None, is_causal=True)
                out[index] = found.squeeze(0)
        return out
