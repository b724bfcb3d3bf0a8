"""What a planned step computes, and how long that is expected to take."""

from __future__ import annotations

from dataclasses import dataclass

from momaserve.core.cost_model import CostModel
from momaserve.core.load import LoadMeter, StepLoad
from momaserve.core.step import StepDraft


@dataclass(frozen=True, slots=True)
class Forecast:
    """A cost model, and what it needs to know of tokens."""

    cost_model: CostModel
    meter: LoadMeter

    def of(self, step: StepDraft) -> tuple[StepLoad, float]:
        """Load of a step and seconds that it is predicted to take."""
        load = step.measured_by(self.meter)
        return load, self.cost_model.predict(load)
