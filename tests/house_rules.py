"""House rules that no linter knows: length of files, and imports that point downwards only.

Run by `make check` as `python -m tests.house_rules`; prints each breach and exits 1.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_LINES = 500
LONG_FOR_A_REASON = {
    "momaserve/training/dictionary/own_glosses.py": "a table of words, not code",
}
PACKAGES = {
    "momaserve": ROOT / "momaserve",
    "momaserve_server": ROOT / "server" / "momaserve_server",
    "momaserve_bench": ROOT / "benchmarks" / "momaserve_bench",
    "momaserve_client": ROOT / "clients" / "momaserve_client",
}
FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(rooms.split())
    for rooms in (
        "momaserve_server momaserve_bench",
        "momaserve.training momaserve.demo momaserve.router_lab",
        "momaserve.async_engine momaserve.llm momaserve.warm_up momaserve.environment",
        "momaserve.engine",
        "momaserve.course",
        "momaserve.tally momaserve.step_timer momaserve.sampling_checks",
        "momaserve.loading",
        "momaserve.runner momaserve.core momaserve.tokens",
        "momaserve.models",
        "momaserve.layers",
        "momaserve.kernels",
        "momaserve.request momaserve.outputs momaserve.stats momaserve.watchdog",
        "momaserve.sampling",
        "momaserve.config",
        "momaserve.modality",
        "momaserve.errors",
    )
)
"""From the roof down. A room may import its own floor's room and any floor below it."""
NEIGHBOURS = {
    ("momaserve_bench", "momaserve_server"): {"momaserve_server.cli_options"},
    ("momaserve.runner", "momaserve.core"): {"momaserve.core.plan"},
    ("momaserve.runner", "momaserve.tokens"): {"momaserve.tokens.grammar"},
    ("momaserve.training", "momaserve.demo"): {"momaserve.demo"},
    ("momaserve.router_lab", "momaserve.training"): {"momaserve.training"},
    ("momaserve.stats", "momaserve.outputs"): {"momaserve.outputs"},
}
"""Imports between rooms of one floor, and the modules they are limited to."""
NO_TORCH = (
    "momaserve.core",
    "momaserve.tokens.grammar",
    "momaserve.models.config",
    "momaserve.models.presets",
)


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, path) of every module of our packages."""
    for package, root in PACKAGES.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join((package, *(p for p in parts if p != "__init__")))
            yield name, path


def room_of(module: str) -> str | None:
    """The room of a module, if it is one of ours that stands on a floor."""
    for floor in FLOORS:
        for room in floor:
            if module == room or module.startswith(f"{room}."):
                return room
    return None


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports at run time (not under TYPE_CHECKING)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(child for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def floor_breaches(module: str, path: Path) -> Iterator[str]:
    here = room_of(module)
    if here is None:
        return
    level = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    for name in imports(path):
        if name == "torch" and module.startswith(NO_TORCH):
            yield f"{module} must not import torch"
        there = room_of(name)
        if there is None or there == here:
            continue
        if (here, there) in NEIGHBOURS:
            if not any(name.startswith(allowed) for allowed in NEIGHBOURS[here, there]):
                yield f"{module} imports {name}: only {sorted(NEIGHBOURS[here, there])} is allowed"
        elif level[there] <= level[here]:
            yield f"{module} imports {name}, which is not on a floor below it"


def length_breaches() -> Iterator[str]:
    roots = [*PACKAGES.values(), ROOT / "tests", ROOT / "benchmarks"]
    for path in sorted(p for root in roots for p in root.rglob("*.py")):
        count = len(path.read_text(encoding="utf-8").splitlines())
        name = str(path.relative_to(ROOT))
        if count > MAX_LINES and name not in LONG_FOR_A_REASON:
            yield f"{name} has {count} lines, more than {MAX_LINES}"


def breaches() -> list[str]:
    """Everything that is against the rules, one line each."""
    found = list(length_breaches())
    for module, path in modules():
        found += floor_breaches(module, path)
    return found


def main() -> int:
    found = breaches()
    for breach in found:
        print(breach, file=sys.stderr)
    print(f"house rules: {len(found)} breaches")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
