"""What is measured of a device is a rate; how fast it is, no test can say."""

from __future__ import annotations

import math

import pytest
import torch

from momaserve.core.cost_model import MachineRates
from momaserve.runner.rates import measure_rates
from tests.runner.factory import CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_rates_are_positive_and_finite(dtype: torch.dtype) -> None:
    found = measure_rates(dtype, CPU)
    assert all(0 < value < math.inf for value in found)
    MachineRates(
        bytes_per_s=found.bytes_per_s, flops_per_s=found.flops_per_s, fixed_s=found.operation_s
    )


def test_an_operation_takes_less_than_a_second() -> None:
    assert measure_rates(torch.float32, CPU).operation_s < 1.0
