"""How measurements spread: mean, median, deviation and percentiles as vLLM computes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Numbers = dict[str, float | None]


def linear_percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, linearly: numpy's default, and so vLLM's."""
    return float(np.percentile(values, percent))


def spread(name: str, values_s: Sequence[float], percents: Sequence[float]) -> Numbers:
    """`{mean,median,std,p99,…}_NAME_ms` of durations in seconds; all None where there are none.

    Args:
        percents: of percentiles, in [0, 100]; 99.9 makes the key `p99.9_NAME_ms`.
    """
    keys = [f"mean_{name}_ms", f"median_{name}_ms", f"std_{name}_ms"]
    keys += [f"p{percent:g}_{name}_ms" for percent in percents]
    if not values_s:
        return dict.fromkeys(keys)
    ms = np.asarray(values_s) * 1e3
    found = [ms.mean(), np.median(ms), ms.std(), *np.percentile(ms, percents)]
    return {key: float(value) for key, value in zip(keys, found, strict=True)}
