"""Which backends have kernels to measure. A backend is one line here and a module of cases."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from momaserve.errors import ConfigError
from momaserve_bench.kernels.case import Case, Sizes


@dataclass(frozen=True, slots=True)
class Table:
    """The cases of one backend."""

    backend: str
    obstacle: Callable[[], str | None]
    """Why its kernels cannot run here, or None."""
    module: str
    """Has `cases(family, sizes)`; imported only where nothing is in the way."""

    def cases(self, family: str, sizes: Sizes) -> Iterator[Case]:
        """Cases of one of `arguments.FAMILIES`, smallest first."""
        found: Iterator[Case] = import_module(self.module).cases(family, sizes)
        return found


def _obstacle_to_cpu() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install 'momaserve[cpu]')"
    return None


TABLES: tuple[Table, ...] = (Table("cpu", _obstacle_to_cpu, "momaserve_bench.kernels.cpu_table"),)


def tables_here() -> list[Table]:
    """Those that can run.

    Raises:
        ConfigError: none can, for the reasons that are named.
    """
    obstacles = {table.backend: table.obstacle() for table in TABLES}
    found = [table for table in TABLES if obstacles[table.backend] is None]
    if not found:
        reasons = "; ".join(f"{backend}: {reason}" for backend, reason in obstacles.items())
        raise ConfigError(f"there are no compiled kernels to measure: {reasons}")
    return found
