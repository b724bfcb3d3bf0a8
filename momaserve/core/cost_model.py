"""Predicts how long a step takes. Has no clock: what steps really took is told to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from momaserve.core.correction import Correction, Shares
from momaserve.core.load import StepLoad
from momaserve.core.model_costs import ModelCosts
from momaserve.errors import ConfigError

_BUCKETS = 400
"""Of relative errors, one per cent each; the last one holds all above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """What a machine does per second, measured or given.

    Raises:
        ConfigError: a rate that is not positive, or a negative time.
    """

    bytes_per_s: float
    flops_per_s: float
    fixed_s: float = 0.0
    """Of each step, whatever it computes."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 or (value == 0 and field.name == "fixed_s")):
                raise ConfigError(f"{field.name} must be positive, got {value}")


class CostModel:
    """A step's time: a fixed part, and for each part of the model the longer of reading and
    computing. Both are corrected by factors that the measured steps teach.

    The same loads and times in the same order give the same predictions.
    """

    def __init__(self, costs: ModelCosts, rates: MachineRates) -> None:
        self.costs = costs
        self.rates = rates
        self._correction = Correction()
        self._errors = [0] * _BUCKETS
        self._num_observed = 0

    @property
    def factors(self) -> Sequence[float]:
        """On the fixed part, on reading and on computing."""
        return tuple(self._correction.factors)

    def predict(self, load: StepLoad) -> float:
        """Seconds that a step with this load is expected to take."""
        return self._correction.seconds(self._shares(load))

    def observe(self, load: StepLoad, seconds: float, predicted_s: float) -> None:
        """Takes note of what a step took, and of what had been predicted when it was planned."""
        if seconds > 0:
            error = abs(predicted_s - seconds) / seconds
            self._errors[min(_BUCKETS - 1, int(100 * error))] += 1
            self._num_observed += 1
        self._correction.observe(self._shares(load), seconds)

    @property
    def median_error(self) -> float | None:
        """Median of |predicted - measured| / measured over all steps, to a hundredth.

        At most 4; None before the first step.
        """
        seen = 0
        for bucket, count in enumerate(self._errors):
            seen += count
            if 2 * seen >= self._num_observed > 0:
                return (bucket + 0.5) / 100
        return None

    def _shares(self, load: StepLoad) -> Shares:
        """Uncorrected seconds, by which of reading and computing is thought to take longer."""
        _, per_byte, per_flop = self._correction.factors
        memory = compute = 0.0
        for part in self.costs.parts(load):
            reading = part.num_bytes / self.rates.bytes_per_s
            computing = part.flops / self.rates.flops_per_s
            if per_byte * reading >= per_flop * computing:
                memory += reading
            else:
                compute += computing
        return Shares(self.rates.fixed_s, memory, compute)
