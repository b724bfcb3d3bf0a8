"""From logits to tokens: grammar mask, temperature, top-k, top-p, min-p, and the draw.

`prepare` runs on the host and lays out one row per sampled token; `sample` runs on the device.
The random number of a row is a pure function of (seed, token position), and no row's result
depends on the others', so a request gets the same tokens alone and in a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from momaserve.sampling import Distribution
from momaserve.tokens.grammar import Choices, GrammarSpec

_CHOICE_CODES = {choice: code for code, choice in enumerate(Choices)}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """What one row of logits is sampled with."""

    choices: Choices
    distribution: Distribution
    seed: int
    position: int
    """Position of the token to be drawn in its sequence."""
    bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit); -inf bans it."""


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a pure function of its arguments: 53 bits of BLAKE2b."""
    data = seed.to_bytes(9, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def grammar_masks(spec: GrammarSpec) -> Tensor:
    """bool [len(Choices), V]: which ids each kind of choice allows."""
    masks = torch.zeros(len(Choices), spec.vocab_size, dtype=torch.bool)
    images = spec.image_ids
    text = torch.ones(spec.vocab_size, dtype=torch.bool)
    if images:
        text[images.start : images.stop] = False
        masks[_CHOICE_CODES[Choices.IMAGE], images.start : images.stop] = True
    for token_id in spec.unsampled_text_ids:
        text[token_id] = False
    masks[_CHOICE_CODES[Choices.TEXT]] = text
    masks[_CHOICE_CODES[Choices.TEXT_OR_IMAGE]] = text
    if spec.begin_image is not None:
        masks[_CHOICE_CODES[Choices.TEXT_OR_IMAGE], spec.begin_image] = True
    return masks


class Sampler:
    """Draws one token per row."""

    def __init__(self, spec: GrammarSpec, device: torch.device) -> None:
        self._masks = grammar_masks(spec).to(device)

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """Token ids drawn from float32 logits [S, V], one per row."""
        device = logits.device
        codes = torch.tensor([_CHOICE_CODES[row.choices] for row in rows], device=device)
        scores = logits.masked_fill(~self._masks[codes], float("-inf"))
        _add_biases(scores, rows)
        greedy = scores.argmax(-1)
        chosen = greedy.clone()
        for indices, keep in _groups(rows):
            index = torch.tensor(indices, device=device)
            some = [rows[i] for i in indices]
            chosen[index] = _draw(scores[index], some, keep)
        result: list[int] = chosen.tolist()
        return result


def _add_biases(scores: Tensor, rows: Sequence[SampleRow]) -> None:
    entries = [(i, token, value) for i, row in enumerate(rows) for token, value in row.bias]
    if entries:
        where, tokens, values = zip(*entries, strict=True)
        index = (
            torch.tensor(where, device=scores.device),
            torch.tensor(tokens, device=scores.device),
        )
        scores.index_put_(index, torch.tensor(values, device=scores.device), accumulate=True)


def _groups(rows: Sequence[SampleRow]) -> Iterable[tuple[list[int], str]]:
    """Rows that are drawn at random, grouped by how their candidates are found.

    The way depends on a row's own parameters alone, never on its mates.
    """
    groups: dict[str, list[int]] = {"all": [], "top_k": [], "sorted": []}
    for index, row in enumerate(rows):
        distribution = row.distribution
        if distribution.temperature == 0:
            continue
        if distribution.top_k:
            groups["top_k"].append(index)
        elif distribution.top_p < 1:
            groups["sorted"].append(index)
        else:
            groups["all"].append(index)
    return ((indices, keep) for keep, indices in groups.items() if indices)


def _draw(scores: Tensor, rows: Sequence[SampleRow], keep: str) -> Tensor:
    """Inverse-CDF draw from masked scores [S, V] -> token ids [S].

    Order of the filters: temperature, top-k, top-p, min-p.
    """
    device = scores.device

    def column(values: Iterable[float], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device).unsqueeze(1)

    # Scaling after subtracting the best keeps tiny temperatures from overflowing.
    best = scores.amax(-1, keepdim=True)
    temperature = column(r.distribution.temperature for r in rows)
    scaled = (scores - best).double() / temperature
    ids: Tensor | None = None
    if keep == "top_k":
        size = scores.shape[1]
        counts = column((min(r.distribution.top_k, size) for r in rows), torch.int64)
        ids = _best_ids(scores, int(counts.max()))
        rank = torch.arange(ids.shape[1], device=device)
        scaled = scaled.gather(1, ids).masked_fill(rank >= counts, float("-inf"))
    elif keep == "sorted":
        scaled, ids = scaled.sort(dim=-1, descending=True, stable=True)
    # Weights of the best token 1, not normalised: a sum would round differently with the width
    # of the table, which mates decide; the last of running sums does not.
    weights = scaled.exp()
    if ids is not None:
        cumulative = weights.cumsum(-1)
        before = cumulative - weights
        top_p = column(r.distribution.top_p for r in rows)
        # The likeliest token has nothing before it, so it always stays.
        is_cut = (before >= top_p * cumulative[:, -1:]) & (top_p < 1)
        weights = weights.masked_fill(is_cut, 0.0)
    min_p = column(r.distribution.min_p for r in rows)
    weights = weights.masked_fill(weights < min_p, 0.0)
    cumulative = weights.cumsum(-1)
    draws = column(uniform(r.seed, r.position) for r in rows) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, draws, right=True).clamp_max(scaled.shape[1] - 1)
    return (index if ids is None else ids.gather(1, index)).squeeze(1)


def _best_ids(scores: Tensor, count: int) -> Tensor:
    """Ids of the `count` best of float32 scores [S, V], best first, ties by id: [S, count].

    `topk` alone breaks ties as it likes, and otherwise for another count, which mates decide;
    a stable sort of the whole vocabulary is ten times as slow.
    """
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # increases with the score
    keys = (order << 32) - torch.arange(scores.shape[1], device=scores.device)
    return keys.topk(count, dim=-1).indices
