"""Memory of this process that is really there."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

_STATM = Path("/proc/self/statm")
NOW = "resident bytes, from /proc/self/statm"
PEAK = "most resident bytes so far, from getrusage, since /proc/self/statm is not there"


@dataclass(frozen=True, slots=True)
class Resident:
    """A reading."""

    num_bytes: int
    source: str
    """NOW or PEAK."""


def resident_bytes(statm: Path = _STATM) -> Resident:
    """What the process has in memory, weights and libraries included.

    Args:
        statm: of Linux: sizes in pages, the second one resident.
    """
    try:
        pages = int(statm.read_text(encoding="ascii").split()[1])
        return Resident(pages * resource.getpagesize(), NOW)
    except (OSError, IndexError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return Resident(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, PEAK)
