"""`make peers`: makes the environments of the other engines, each on its own.

One that cannot be made is named with pip's last words, and the others are made all the same.
pip takes its indexes from the user's own configuration.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from momaserve_bench.peers.environments import RECIPES, ROOT, STAMP, Recipe, absence, python_of

_LIST_REQUIREMENTS = """
import importlib.metadata, re, sys
package, *without = sys.argv[1:]
for line in importlib.metadata.requires(package) or ():
    if re.match(r"[A-Za-z0-9._-]+", line).group().lower() not in without:
        print(line)
"""


class InstallError(Exception):
    """A step of an installation failed; the message is what it said last."""


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 0 if all that were asked for are there in the end, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "peers",
        nargs="*",
        metavar="PEER",
        help=f"which to make, of {', '.join(RECIPES)} (default: all)",
    )
    peers = parser.parse_args(words).peers or list(RECIPES)
    unknown = [peer for peer in peers if peer not in RECIPES]
    if unknown:
        parser.error(f"no peer is called {unknown[0]!r}; there are {', '.join(RECIPES)}")
    failed = [peer for peer in peers if not make(peer)]
    print(f"peers: {len(peers) - len(failed)} of {len(peers)} environments are there")
    return 1 if failed else 0


def make(peer: str, root: Path = ROOT) -> bool:
    """Make one environment unless it is there. False if it could not be made; says why."""
    if absence(peer, root) is None:
        print(f"peers: {peer} is there")
        return True
    print(f"peers: installing {peer} into {root / peer} (minutes)", flush=True)
    try:
        _install(peer, RECIPES[peer], root)
    except InstallError as error:
        print(f"peers: {peer} could not be made: {error}", file=sys.stderr)
        return False
    (root / peer / STAMP).write_text(RECIPES[peer].digest + "\n", encoding="utf-8")
    print(f"peers: {peer} is ready", flush=True)
    return True


def _install(peer: str, recipe: Recipe, root: Path) -> None:
    """Raises InstallError."""
    shutil.rmtree(root / peer, ignore_errors=True)
    try:
        venv.create(root / peer, with_pip=True, symlinks=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InstallError(f"no virtual environment: {error}") from error
    python = str(python_of(peer, root))
    variables = {**os.environ, **dict(recipe.variables)}
    cores = str(len(os.sched_getaffinity(0)))
    variables.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", cores)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *recipe.requirements], variables)
    for package in recipe.bare:
        _run([*pip, "--no-deps", package], variables)
        name = package.partition("==")[0]
        needs = _run([python, "-c", _LIST_REQUIREMENTS, name, *recipe.without], variables)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
            listed.write(needs)
            listed.flush()
            # The pinned ones again, so that nothing that is needed moves them.
            _run([*pip, *recipe.requirements, "--requirement", listed.name], variables)


def _run(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Standard output of a command. Raises InstallError with the last line of its errors."""
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines()]
        said = [line for line in lines if line.startswith("ERROR")] or [*filter(None, lines)]
        raise InstallError(said[-1] if said else f"exit status {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
