"""From times of tokens to rates, medians and ratios: one definition for all engines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEFINITION = (
    "decode tokens/s: tokens that came after every row had its first one, over the time from then "
    "to the last token; prefill tokens/s: tokens of the prompt over the time to its first new token"
)


@dataclass(frozen=True, slots=True)
class Summary:
    """The middle and the ends of what the rounds gave."""

    median: float
    lowest: float
    highest: float


def decode_rate(times: Sequence[Sequence[float]]) -> float:
    """Decode tokens/s by `DEFINITION`; `times` of each row's tokens in seconds, increasing.

    Raises:
        ValueError: nothing came after the first tokens, or no time passed.
    """
    start = max(row[0] for row in times)
    end = max(row[-1] for row in times)
    count = sum(time > start for row in times for time in row)
    if count == 0 or end <= start:
        raise ValueError("no token came after every row had its first one")
    return count / (end - start)


def first_token_s(times: Sequence[Sequence[float]]) -> float:
    """Seconds until every row had its first token."""
    return max(row[0] for row in times)


def summary(values: Sequence[float]) -> Summary:
    return Summary(statistics.median(values), min(values), max(values))


def ratios(ours: float, peers: Mapping[str, float]) -> dict[str, float]:
    """Our rate over each peer's."""
    return {name: ours / rate for name, rate in peers.items()}


def best(peers: Mapping[str, float]) -> str | None:
    """The peer with the highest rate; None if there is none."""
    return max(peers, key=peers.__getitem__, default=None)
