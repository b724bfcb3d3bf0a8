"""When requests are due: a seeded renewal process with gamma gaps."""

from __future__ import annotations

import math

import numpy as np

from momaserve.errors import ConfigError


def arrival_times(count: int, *, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which `count` requests are due, increasing.

    Gaps are gamma with shape `burstiness` and mean 1 / `rate`, as in vLLM's benchmark; shape 1
    makes a Poisson process. Unlike there, they are not stretched to a total of count / rate,
    which would make the process depend on its end.

    Args:
        rate: requests per second; inf makes all due at once.

    Raises:
        ConfigError: a rate or shape that is not positive.
    """
    if not rate > 0:
        raise ConfigError(f"--request-rate must be above 0, or inf, got {rate:g}")
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise ConfigError(f"--burstiness must be above 0, got {burstiness:g}")
    if math.isinf(rate):
        return [0.0] * count
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(shape=burstiness, scale=1 / (rate * burstiness), size=count)
    times: list[float] = gaps.cumsum().tolist()
    return times
