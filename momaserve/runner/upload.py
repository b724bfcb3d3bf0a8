"""Brings small arrays from the host to the device without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def host_bytes(count: int, device: torch.device) -> Tensor:
    """uint8 [count] on the host, zero, from where a copy to `device` need not wait.

    The memory of pinned tensors is given out again once the copies from it are done.
    """
    return torch.zeros(count, dtype=torch.uint8, pin_memory=device.type == "cuda")


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on `device`."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
