"""How many tokens a step may have if it is to last no longer than its target. No clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from momaserve.core.cost_model import CostModel
from momaserve.core.load import LoadMeter, StepLoad, visible_pairs
from momaserve.core.step import token_parts
from momaserve.modality import Modality
from momaserve.request import Request, TokenSequence


class Pace:
    """Fills steps with prompt tokens up to a predicted time.

    A step always has a token for each running sequence and, behind them, a block of prompt
    tokens, however long that takes: neither decoding nor prompts stand still.
    """

    def __init__(
        self,
        cost_model: CostModel,
        meter: LoadMeter,
        *,
        target_s: float,
        block_size: int,
        max_num_tokens: int,
    ) -> None:
        self._cost_model = cost_model
        self._meter = meter
        self._target_s = target_s
        self._block_size = block_size
        self._max_num_tokens = max_num_tokens

    def budget(self, missing: Sequence[tuple[Request, int]], waiting: Request | None) -> int:
        """Tokens of the next step, at most `max_num_tokens`.

        The prompt tokens are taken to be those of the oldest running request that has many to
        compute, else of `waiting`, as far as their modality and context go.

        Args:
            missing: running requests that take part, and how many tokens each one lacks.
            waiting: who starts next, if anybody.
        """
        limit = self._max_num_tokens
        long = [r for r, count in missing if count > r.num_sequences]
        filler = long[0] if long else waiting
        if filler is None:
            return limit
        least = self._load_of_decoding(request for request, _ in missing)
        num_least = sum(request.num_sequences for request, _ in missing)
        fewest, most = self._block_size, limit - num_least
        if most <= fewest:
            return limit
        while fewest < most:  # the longest chunk that is predicted to end in time
            count = (fewest + most + 1) // 2
            load = least.plus(self._chunk(filler.sequence, count))
            if self._cost_model.predict(load) <= self._target_s:
                fewest = count
            else:
                most = count - 1
        return num_least + fewest

    def _load_of_decoding(self, requests: Iterable[Request]) -> StepLoad:
        """One token of each sequence, and a row to sample from."""
        parts: list[tuple[TokenSequence, int, int]] = []
        num_code_rows = 0
        for request in requests:
            count = 1 + len(request.companions)
            parts += token_parts(request, [1] * count)
            if self._meter.phase(request.sequence) is Modality.IMAGE:
                num_code_rows += count
        return self._meter.measure(parts, len(parts), num_code_rows)

    def _chunk(self, sequence: TokenSequence, count: int) -> StepLoad:
        """`count` tokens like those that a sequence computes next, itself or others like it."""
        start = sequence.num_computed_tokens
        num_there = max(1, min(count, sequence.num_tokens - start))
        share = self._meter.count_images(sequence, start, num_there) / num_there
        return StepLoad(
            text_tokens=count * (1.0 - share),
            image_tokens=count * share,
            kv_tokens=start + count,
            visible_pairs=visible_pairs(start, count),
            sampled_rows=1,
        )
