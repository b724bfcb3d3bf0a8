"""A step while it is being planned, and how its tokens are divided. Knows no block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from momaserve.config import RoutingPolicy
from momaserve.core.load import LoadMeter, StepLoad
from momaserve.core.plan import OWN, PlannedSequence, StepPlan
from momaserve.modality import Modality
from momaserve.request import Request, TokenSequence


class StepDraft:
    """What is planned so far, and the tokens that are left."""

    def __init__(self, budget: int, limit: int) -> None:
        """
        Args:
            budget: tokens that the step should have, chosen for the time that they take.
            limit: tokens that it may have.
        """
        assert budget <= limit, (budget, limit)
        self.budget = budget
        """Tokens left; below 0 after something that could not be cut."""
        self._first_budget = budget
        self._limit = limit
        self.requests: dict[Request, None] = {}
        """Every request of the step, once."""
        self.sequences: list[PlannedSequence] = []
        self._parts: list[tuple[TokenSequence, int, int]] = []
        """(sequence, first token, count) of each of `sequences`."""
        self.samples: list[str] = []
        self.leaders: list[Request] = []
        """Requests of `samples` whose followers may start now."""
        self.forks: dict[str, str] = {}
        self.copies: list[tuple[int, int]] = []
        self.num_preemptions = 0
        self.num_cache_queries = 0
        self.num_cache_hits = 0

    def add(self, request: Request, index: int, start: int, count: int) -> None:
        """Takes computed tokens of the request's own sequence (index OWN) or of a companion."""
        sequence = request.sequence if index == OWN else request.companions[index]
        self.requests[request] = None
        self._parts.append((sequence, start, count))
        self.sequences.append(
            PlannedSequence(
                request.request_id,
                index,
                start,
                count,
                sequence.blocks,
                sequence.entry_blocks,
                sequence.num_entries,
                sequence.max_num_entries,
            )
        )
        self.budget -= count

    @property
    def num_tokens(self) -> int:
        """Tokens taken so far."""
        return self._first_budget - self.budget

    def share_for(self, request: Request) -> int:
        """Tokens that a request may take which starts now.

        What must be computed in one step is not cut for the sake of time: a whole prompt, and
        the last tokens of all sequences of a request.
        """
        room = self._limit - self.num_tokens
        if prompt_must_be_whole(request):
            return room
        return max(self.budget, min(request.num_sequences, room))

    def plan(self, load: StepLoad | None = None, predicted_s: float | None = None) -> StepPlan:
        """
        Args:
            load: of this step (`measured_by`), if its time is predicted.
        """
        return StepPlan(
            sequences=tuple(self.sequences),
            samples=tuple(self.samples),
            forks=self.forks,
            copies=tuple(self.copies),
            num_tokens=self.num_tokens,
            load=load,
            predicted_s=predicted_s,
            num_preemptions=self.num_preemptions,
            num_cache_queries=self.num_cache_queries,
            num_cache_hits=self.num_cache_hits,
        )

    def measured_by(self, meter: LoadMeter) -> StepLoad:
        """The load of what is planned so far."""
        num_rows = num_code_rows = 0
        samples = frozenset(self.samples)
        for request in self.requests:
            if request.request_id in samples:
                count = 1 + len(request.companions)
                num_rows += count
                if meter.phase(request.sequence) is Modality.IMAGE:
                    num_code_rows += count
            if request.params.prompt_logprobs is not None:
                num_rows += self._num_scored(request)
        return meter.measure(self._parts, num_rows, num_code_rows)

    def _num_scored(self, request: Request) -> int:
        """Prompt tokens of a request that the step computes."""
        return sum(
            max(0, min(count, request.num_prompt_tokens - start))
            for sequence, start, count in self._parts
            if sequence is request.sequence
        )


def token_parts(
    request: Request, counts: Sequence[int]
) -> Iterator[tuple[TokenSequence, int, int]]:
    """(sequence, its first new token, count) of a request's sequences, its own first."""
    sequences = (request.sequence, *request.companions)
    for sequence, count in zip(sequences, counts, strict=True):
        yield sequence, sequence.num_computed_tokens, count


def share_budget(missing: list[tuple[Request, int]], budget: int) -> list[int]:
    """How many of its missing tokens each running request may compute, in the same order.

    Fewest missing tokens first: decoding is not slowed by a long prompt, which gets what is
    left. One token is kept for each sequence still to come, so that all make progress.
    """
    counts = [count for _, count in missing]
    if sum(counts) <= budget:
        return counts
    shares = [0] * len(missing)
    kept = sum(request.num_sequences for request, _ in missing)
    for index in sorted(range(len(missing)), key=counts.__getitem__):
        kept -= missing[index][0].num_sequences
        shares[index] = min(counts[index], budget - kept)
        budget -= shares[index]
    return shares


def _missing(sequence: TokenSequence, request: Request) -> int:
    """Tokens still to compute; one more is known by then if it is being sampled now."""
    return len(sequence.token_ids) + request.num_pending_tokens - sequence.num_computed_tokens


def num_missing(request: Request) -> int:
    """Tokens that a request has to compute before its next one can be sampled."""
    sequence = request.sequence  # not by `_missing`: this runs for every request in every step
    missing = len(sequence.token_ids) + request.num_pending_tokens - sequence.num_computed_tokens
    if request.companions:
        missing += sum(_missing(companion, request) for companion in request.companions)
    return missing


def prompt_must_be_whole(request: Request) -> bool:
    """Expert choice ranks a prompt's tokens against each other, so it needs them together."""
    return request.sequence.prompt_routing is RoutingPolicy.EXPERT_CHOICE


def split(request: Request, share: int) -> list[int] | None:
    """New tokens of each sequence of a request out of `share`; None when it must wait.

    The last tokens of all its sequences are computed in one step, the one that samples: the
    logits that guidance combines are all of that step.
    """
    missing = _missing(request.sequence, request)
    if not request.companions:
        counts = [min(missing, share)]
    elif num_missing(request) <= share:
        counts = [missing, *(_missing(c, request) for c in request.companions)]
    else:
        counts = []
        for sequence in (request.sequence, *request.companions):
            counts.append(max(0, min(_missing(sequence, request) - 1, share - sum(counts))))
    reached = request.sequence.num_computed_tokens + counts[0]
    if prompt_must_be_whole(request) and reached < request.num_prompt_tokens:
        return None
    return counts if any(counts) else None
