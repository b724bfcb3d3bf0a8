"""How far a long run is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_NUM_LINES = 10


class Progress:
    """Counts the steps of one part after another, on stderr."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._name = ""
        self._done = self._total = 0

    def begin(self, name: str, total: int) -> None:
        self.end()
        self._name, self._done, self._total = name, 0, total
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=name, unit="pass", dynamic_ncols=True)
        else:
            self.say(f"{name}: {total} passes")

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif self._done * _NUM_LINES // self._total > (self._done - 1) * _NUM_LINES // self._total:
            self.say(f"{self._name}: {self._done} of {self._total}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
