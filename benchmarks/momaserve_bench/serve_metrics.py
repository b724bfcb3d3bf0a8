"""From the records of requests to the numbers of a run, under vLLM's names where it has one.

Everything is counted twice that may be waited for in the client: from when a request was sent,
as vLLM does under the same names, and from when it was due (`scheduled_…`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from momaserve.errors import ConfigError
from momaserve_bench.records import Outcome, RequestRecord
from momaserve_bench.serve_options import GOODPUT_METRICS, METRICS
from momaserve_bench.spread import spread
from momaserve_bench.workload import Kind

STREAMS = (Kind.TEXT, Kind.IMAGE_INPUT)
"""Kinds whose answers come token by token."""


def parse_goodput(words: Sequence[str]) -> dict[str, float]:
    """Limits in ms by name, out of words such as "ttft:200".

    Raises:
        ConfigError: an unknown name, one given twice, or a limit that is no positive number.
    """
    limits: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition(":")
        if name not in GOODPUT_METRICS:
            raise ConfigError(f"--goodput knows {', '.join(GOODPUT_METRICS)}, not {name!r}")
        if name in limits:
            raise ConfigError(f"--goodput names {name} twice")
        limit = _number(text)
        if limit is None or limit <= 0:
            raise ConfigError(f"--goodput {name} needs a limit above 0 ms, got {text!r}")
        limits[name] = limit
    return limits


def parse_metrics(text: str) -> list[str]:
    """Raises ConfigError for a name that is not one of METRICS."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"--percentile-metrics knows {', '.join(METRICS)}, not {name!r}")
    return names


def parse_percentiles(text: str) -> list[float]:
    """Raises ConfigError for what is not between 0 and 100."""
    percents: list[float] = []
    for word in text.split(","):
        percent = _number(word)
        if percent is None or not 0 <= percent <= 100:
            raise ConfigError(
                f"--metric-percentiles must be numbers between 0 and 100, got {word!r}"
            )
        percents.append(percent)
    return percents


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def durations(record: RequestRecord) -> dict[str, float | None]:
    """Seconds of one completed request, None where it has no such thing.

    `ttft`, `tpot` and `itl` are of answers in words: pictures do not come token by token. `itl`
    is the longest gap. A probe has its own name and no other.
    """
    sent, last = record.sent_s, record.last_byte_s
    assert sent is not None
    assert last is not None
    if record.kind is Kind.PROBE:
        return {"probe": last - sent}
    first = record.first_token_s if record.kind in STREAMS else None
    gaps = gaps_s(record)
    num_later = record.output_tokens - 1
    return {
        "ttft": _minus(first, sent),
        "scheduled_ttft": _minus(first, record.scheduled_s),
        "tpot": (
            (record.token_times_s[-1] - first) / num_later
            if first is not None and num_later > 0
            else None
        ),
        "itl": max(gaps, default=None),
        "e2el": last - sent,
        "scheduled_e2el": last - record.scheduled_s,
        "first_byte": _minus(record.first_byte_s, sent),
        "image_latency": _minus(record.image_s, sent),
        "scheduled_image_latency": _minus(record.image_s, record.scheduled_s),
        "first_partial_image": _minus(record.first_partial_image_s, sent),
    }


def gaps_s(record: RequestRecord) -> list[float]:
    """Between one piece with tokens and the next, for answers in words."""
    if record.kind not in STREAMS:
        return []
    return [later - earlier for earlier, later in pairwise(record.token_times_s)]


def _minus(later: float | None, earlier: float) -> float | None:
    return None if later is None else later - earlier


def is_good(
    record: RequestRecord, limits_ms: Mapping[str, float], *, is_scheduled: bool = False
) -> bool:
    """Whether a completed request keeps every limit that it has a duration for.

    Args:
        is_scheduled: count from when it was due instead of from when it was sent.
    """
    found = durations(record)
    for name, limit in limits_ms.items():
        key = f"scheduled_{name}" if is_scheduled and f"scheduled_{name}" in found else name
        value = found.get(key)
        if value is not None and 1e3 * value > limit:
            return False
    return True


def summarize(
    records: Sequence[RequestRecord],
    duration_s: float,
    *,
    goodput_ms: Mapping[str, float],
    percentile_metrics: Sequence[str] = METRICS,
    percents: Sequence[float] = (50, 99),
) -> dict[str, Any]:
    """The numbers of a run of `duration_s` seconds; None for what nothing was measured of.

    Rates count completed requests alone. A cancelled request counts as such and nowhere else.
    """
    done = [record for record in records if record.outcome is Outcome.COMPLETED]

    def rate(amount: Callable[[RequestRecord], float]) -> float:
        return sum(map(amount, done)) / duration_s

    def goodput(is_scheduled: bool) -> float | None:
        if not goodput_ms:
            return None
        served = [record for record in done if record.kind is not Kind.PROBE]
        return sum(is_good(r, goodput_ms, is_scheduled=is_scheduled) for r in served) / duration_s

    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": sum(record.outcome is Outcome.FAILED for record in records),
        "cancelled": sum(record.outcome is Outcome.CANCELLED for record in records),
        "probes": sum(record.kind is Kind.PROBE for record in done),
        "images": sum(record.images for record in done),
        "failures": failures(records),
        "total_input_tokens": sum(record.prompt_tokens for record in done),
        "total_output_tokens": sum(record.output_tokens for record in done),
        "request_throughput": len(done) / duration_s,
        "request_goodput": goodput(False),
        "scheduled_request_goodput": goodput(True),
        "output_throughput": rate(lambda r: r.output_tokens),
        "text_output_throughput": rate(lambda r: r.output_tokens - r.image_tokens),
        "image_output_throughput": rate(lambda r: r.image_tokens),
        "total_token_throughput": rate(lambda r: r.prompt_tokens + r.output_tokens),
        "images_per_s": rate(lambda r: r.images),
    }
    measured = measurements(done)
    for name in METRICS:
        result |= spread(name, measured[name], percents if name in percentile_metrics else ())
    return result


def measurements(done: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """All durations of completed requests by name, in seconds; of `itl` every single gap."""
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for record in done:
        for name, value in durations(record).items():
            if name in values and name != "itl" and value is not None:
                values[name].append(value)
        if record.kind is not Kind.PROBE:
            values["itl"] += gaps_s(record)
    return values


def failures(records: Sequence[RequestRecord]) -> list[dict[str, Any]]:
    """Failed requests by reason, the commonest first, each with the first one's message."""
    counts: Counter[str] = Counter()
    examples: dict[str, str | None] = {}
    for record in records:
        if record.outcome is Outcome.FAILED:
            reason = record.reason or "unknown"
            counts[reason] += 1
            examples.setdefault(reason, record.message)
    return [
        {"reason": reason, "count": count, "example": examples[reason]}
        for reason, count in counts.most_common()
    ]
