"""What steps take, as measured and as predicted."""

from __future__ import annotations

import torch

from momaserve.config import SchedulerConfig, Scheduling
from momaserve.core.cost_model import CostModel, MachineRates
from momaserve.core.forecast import Forecast
from momaserve.core.load import LoadMeter
from momaserve.core.model_costs import model_costs
from momaserve.core.plan import StepPlan
from momaserve.models.config import ModelConfig
from momaserve.runner.rates import measure_rates


class StepTimer:
    """Times steps that are settled in order, and lets the cost model learn from them."""

    def __init__(self, forecast: Forecast | None) -> None:
        self.forecast = forecast
        self._settled_at = float("-inf")

    @property
    def median_error(self) -> float | None:
        """Median of |predicted - measured| / measured since the start, if any was predicted."""
        return None if self.forecast is None else self.forecast.cost_model.median_error

    def settle(self, plan: StepPlan, started: float, now: float) -> float:
        """A step that was begun at `started` is over; both on the engine's clock.

        Returns:
            Seconds from its start, or from the end of the step before, if that was later.
        """
        seconds = now - max(started, self._settled_at)
        self._settled_at = now
        if self.forecast is not None and plan.load is not None and plan.predicted_s is not None:
            self.forecast.cost_model.observe(plan.load, seconds, plan.predicted_s)
        return seconds


def make_forecast(
    config: SchedulerConfig,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    rates: MachineRates | None,
) -> Forecast | None:
    """What router-aware scheduling plans with; None under another, which measures nothing.

    Args:
        rates: of the machine; None measures them.
    """
    if config.scheduling is not Scheduling.ROUTER_AWARE:
        return None
    costs = model_costs(model, dtype.itemsize)
    if rates is None:
        measured = measure_rates(dtype, device)
        rates = MachineRates(
            bytes_per_s=measured.bytes_per_s,
            flops_per_s=measured.flops_per_s,
            fixed_s=measured.operation_s * costs.num_operations,
        )
    image = model.image
    meter = LoadMeter(
        range(image.first_token_id, image.stop_token_id) if image is not None else range(0),
        None if image is None else image.begin_token_id,
    )
    return Forecast(CostModel(costs, rates), meter)
