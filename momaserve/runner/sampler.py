"""From logits to tokens: grammar mask, biases, penalties, temperature, filters, and the draw.

Nothing here waits for the device, so the next step can be planned meanwhile. The random number
of a row is a pure function of (seed, token position), and no row's result depends on the
others', so a request gets the same tokens alone and in a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from momaserve.sampling import Distribution
from momaserve.tokens.grammar import Choices, GrammarSpec

CHOICE_CODES = {choice: code for code, choice in enumerate(Choices)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """What makes a row's ids less likely for having occurred."""

    repetition: float
    """Divides positive and multiplies negative logits of ids in prompt or answer; above 0."""
    presence: float
    """Is subtracted from the logits of ids in the answer."""
    frequency: float
    """The same, once per occurrence."""
    prompt_ids: Collection[int]
    """Distinct ids of the prompt."""
    output_counts: Mapping[int, int]
    """How often each id occurs in the answer so far."""


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
    penalties: Penalties | None = None
    """None where there are none, as for every image code."""
    guidance_scale: float = 1.0
    """Of the companions that the row's request has; the runner combines their logits."""


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
        masks[CHOICE_CODES[Choices.IMAGE], images.start : images.stop] = True
    for token_id in spec.unsampled_text_ids:
        text[token_id] = False
    masks[CHOICE_CODES[Choices.TEXT]] = text
    masks[CHOICE_CODES[Choices.TEXT_OR_IMAGE]] = text
    if spec.begin_image is not None:
        masks[CHOICE_CODES[Choices.TEXT_OR_IMAGE], spec.begin_image] = True
    return masks


class Sampler:
    """Draws one token per row."""

    def __init__(self, spec: GrammarSpec, device: torch.device) -> None:
        self.masks = grammar_masks(spec).to(device)

    def sample(
        self, logits: Tensor, rows: Sequence[SampleRow], first_id: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Draws one token per row from float32 logits [S, V].

        Args:
            first_id: with another than 0 the columns are the ids from there on, and no row has
                biases or penalties.

        Returns:
            token ids, int64 [S], and bool [S], whether all logits of the row are finite. A
            broken row is sampled all the same, so that nobody has to wait for the question.
        """
        device = logits.device
        is_finite = logits.isfinite().all(-1)
        logits = logits.masked_fill(~is_finite.unsqueeze(1), 0.0)
        codes = torch.tensor([CHOICE_CODES[row.choices] for row in rows], device=device)
        masks = self.masks[:, first_id : first_id + logits.shape[1]]
        scores = logits.masked_fill(~masks[codes], float("-inf"))
        scores = _biased(scores, rows)
        _penalise(scores, rows)
        greedy = scores.argmax(-1)
        chosen = greedy.clone()
        for indices, keep in _groups(rows):
            index = torch.tensor(indices, device=device)
            some = [rows[i] for i in indices]
            chosen[index] = _draw(scores[index], some, keep)
        return chosen + first_id, is_finite


def _biased(scores: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Masked scores [S, V] plus the rows' biases.

    A row whose every id is banned keeps its scores: something must be drawn, and it must be
    something that the grammar allows.
    """
    biased_rows = [(i, row.bias) for i, row in enumerate(rows) if row.bias]
    if not biased_rows:
        return scores
    entries = _entries(
        [(i, [token for token, _ in bias]) for i, bias in biased_rows], scores.device
    )
    values = [value for _, bias in biased_rows for _, value in bias]
    added = torch.tensor(values, dtype=scores.dtype, device=scores.device)
    biased = scores.index_put(entries, added, accumulate=True)
    if float("-inf") not in values:
        return biased
    is_empty = biased.amax(-1, keepdim=True) == float("-inf")
    return torch.where(is_empty, scores, biased)


def _penalise(scores: Tensor, rows: Sequence[SampleRow]) -> None:
    """Applies the rows' penalties to masked and biased scores [S, V], in place.

    Repetition is that of CTRL (Keskar et al., 1909.05858, section 4.1), except that negative
    logits are multiplied, since dividing them would make an id likelier. Presence and frequency
    are OpenAI's. Only entries of ids that occurred are read and written; -inf stays -inf.
    """
    penalised = [(i, row.penalties) for i, row in enumerate(rows) if row.penalties is not None]
    repeated = [(i, p) for i, p in penalised if p.repetition != 1]
    if repeated:
        # An id of both prompt and answer is there twice, and gets the same value twice.
        entries = _entries(
            [(i, (*p.prompt_ids, *p.output_counts)) for i, p in repeated], scores.device
        )
        factors = [1.0 if row.penalties is None else row.penalties.repetition for row in rows]
        factor = torch.tensor(factors, dtype=torch.float64, device=scores.device)[entries[0]]
        found = scores[entries].double()  # in float32 a tiny factor would become 0
        limit = torch.finfo(scores.dtype).max
        changed = torch.where(found > 0, found / factor, found * factor).clamp(-limit, limit)
        changed.masked_fill_(found == float("-inf"), float("-inf"))
        scores.index_put_(entries, changed.to(scores.dtype))
    counted = [(i, p) for i, p in penalised if p.presence or p.frequency]
    if counted:
        entries = _entries([(i, p.output_counts) for i, p in counted], scores.device)
        losses = [
            p.presence + p.frequency * n for _, p in counted for n in p.output_counts.values()
        ]
        scores[entries] -= torch.tensor(losses, dtype=scores.dtype, device=scores.device)


def _entries(
    ids_of_rows: Sequence[tuple[int, Collection[int]]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of [S, V] that belong to (row, its ids)."""
    lengths = torch.tensor([len(ids) for _, ids in ids_of_rows])
    where = torch.tensor([row for row, _ in ids_of_rows]).repeat_interleave(lengths)
    tokens = torch.tensor([t for _, ids in ids_of_rows for t in ids], dtype=torch.int64)
    return where.to(device), tokens.to(device)


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
        sizes = [min(r.distribution.top_k, size) for r in rows]
        counts = column(sizes, torch.int64)
        ids = _best_ids(scores, max(sizes))
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
