"""How each engine's process is started: its program, its Python and its environment variables."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from momaserve_bench.peers.environments import absence, python_of

OURS = "momaserve"
_PROGRAMS = Path(__file__).parent / "programs"
DENSE_ONLY = ("llama_cpp",)
"""Peers that take no part where there are experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One engine's process before it is started."""

    name: str
    command: tuple[str, ...]
    variables: dict[str, str]
    """Set in its environment beside what is there."""


def launch(name: str, threads: int, root: Path) -> Launch:
    """For `momaserve` this interpreter, for a peer the one of its environment."""
    if name == OURS:
        return launch_ours(name, threads)
    variables = _thread_variables(threads)
    if name == "vllm":
        variables.update(_vllm_variables(threads, root.absolute() / name))
    python = str(python_of(name, root.absolute()))
    return Launch(
        name=name,
        command=(python, str(_PROGRAMS / "answer.py"), name),
        variables=variables,
    )


def launch_ours(label: str, threads: int) -> Launch:
    """momaserve under another name, so that several of them can take turns."""
    return Launch(
        name=label,
        command=(sys.executable, str(_PROGRAMS / "answer.py"), OURS),
        variables=_thread_variables(threads),
    )


def _thread_variables(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def why_not(name: str, has_experts: bool, root: Path) -> str | None:
    """Why a peer is left out, or None if it takes part."""
    if has_experts and name in DENSE_ONLY:
        return f"{name} is compared on dense models only"
    return absence(name, root)


def _vllm_variables(threads: int, environment: Path) -> dict[str, str]:
    """What vLLM sets for its worker processes: Intel's OpenMP, a thread on each core.

    Its engine runs in one process here, because its scheduler's own would poll and take a core.
    """
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(environment / "cache"),
    }
    library = environment / "lib" / "libiomp5.so"
    if library.exists():
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        variables["LD_PRELOAD"] = str(library)
        variables["KMP_BLOCKTIME"] = "5"
        variables["KMP_TPAUSE"] = "0"
        variables["KMP_AFFINITY"] = f"granularity=fine,explicit,proclist=[{cores}]"
    return variables
