"""What is measured on: a CUDA device with its clock, or what a test puts in its place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from momaserve.errors import ConfigError

_START_S = 200e-6
"""More than the host takes to start a piece of work."""
_CYCLES_PER_S = 2e9
"""Of a GPU, about."""


class Device(Protocol):
    """Runs work in order, beside the host."""

    torch_device: torch.device
    num_multiprocessors: int

    def describe(self) -> dict[str, Any]:
        """What a report says of it."""
        ...

    def synchronize(self) -> None: ...

    def now(self) -> float:
        """Seconds on the host's clock."""
        ...

    def mark(self) -> Any:
        """A place in the order of the device's work."""
        ...

    def occupy(self, seconds: float) -> None:
        """Gives the device that much to do, about; what is started meanwhile then runs without
        gaps, however long it takes to start."""
        ...

    def seconds_between(self, first: Any, last: Any) -> float:
        """From when the device got to one mark to when it got to a later one; waits for that."""
        ...

    def peak_bytes(self) -> int:
        """Most memory that was taken at once since the start."""
        ...

    def kernel_times(self, work: Callable[[], object]) -> list[KernelTime]:
        """What ran on the device during `work`, by name, longest first; empty where nobody can
        tell."""
        ...


@dataclass(frozen=True, slots=True)
class KernelTime:
    name: str
    seconds: float
    """All of its launches."""
    count: int


class CudaDevice:
    """The current CUDA device, timed by CUDA events."""

    def __init__(self) -> None:
        """
        Raises:
            ConfigError: there is none.
        """
        if not torch.cuda.is_available():
            raise ConfigError(
                f"there is no CUDA device: torch {torch.__version__} sees none, and this measures "
                "nothing else"
            )
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.torch_device)
        self.num_multiprocessors: int = self._properties.multi_processor_count

    def describe(self) -> dict[str, Any]:
        properties = self._properties
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": self.num_multiprocessors,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def now(self) -> float:
        return time.perf_counter()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def occupy(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * _CYCLES_PER_S))  # type: ignore[no-untyped-call]

    def seconds_between(self, first: Any, last: Any) -> float:
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def peak_bytes(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.torch_device))

    def kernel_times(self, work: Callable[[], object]) -> list[KernelTime]:
        self.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            work()
            self.synchronize()
        found = [
            KernelTime(entry.key, entry.self_device_time_total / 1e6, entry.count)
            for entry in trace.key_averages()
            if str(entry.device_type).endswith("CUDA")
        ]
        return sorted(found, key=lambda one: one.seconds, reverse=True)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one piece of work, run several times."""

    median_s: float
    fastest_s: float
    num_runs: int


def time_on(
    device: Device, work: Callable[[], object], *, num_runs: int, num_warmup: int, inner: int = 1
) -> Times:
    """Times work by the device's marks.

    Args:
        num_warmup: runs before, which are not counted; they compile and capture.
        inner: works back to back between two marks, so that starting one hides behind another;
            the times are of one.
    """
    for _ in range(num_warmup):
        work()
    device.synchronize()
    seconds: list[float] = []
    for _ in range(num_runs):
        device.occupy(inner * _START_S)
        first = device.mark()
        for _ in range(inner):
            work()
        seconds.append(device.seconds_between(first, device.mark()) / inner)
    return Times(median(seconds), min(seconds), num_runs)


class Budget:
    """The time that a call may take."""

    def __init__(self, device: Device, limit_s: float) -> None:
        self._device = device
        self._ends = device.now() + limit_s
        self.limit_s = limit_s

    @property
    def is_spent(self) -> bool:
        return self._device.now() >= self._ends
