"""`python answer.py ENGINE`: holds one engine and answers requests, one JSON object a line.

    {"load": {...}}  ->  {"versions": {...}, "settings": {...}}
    {"run": {"prompts": [[id, ...], ...], "num_new": n, "pictures": [bool, ...]}}
                     ->  {"tokens": [[id, ...], ...], "times": [[seconds, ...], ...],
                          "settings": {...}}
    {"NAME": {...}}  ->  what the engine's method NAME makes of it, where it has more to tell
    anything that goes wrong  ->  {"error": "..."}

`times` has one entry per token: seconds from the start of the run until the caller could have
had it. `settings` may know more after a run than before. Between answers the process is blocked
reading. It runs in any engine's environment, so it knows the standard library alone; `ENGINE`
names the module `run_ENGINE` beside this file.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from typing import Any, Protocol


class Engine(Protocol):
    """What a module `run_...` calls `Engine`; it is built from the object under "load"."""

    versions: dict[str, str]
    settings: dict[str, Any]

    def run(
        self, prompts: list[list[int]], num_new: int, pictures: list[bool]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Generate exactly `num_new` tokens for each prompt, greedily, all together.

        Args:
            pictures: which rows generate a picture's tokens; of use to momaserve alone.

        Returns:
            The new token ids of each row, and when each was there, in seconds from the start.
        """


def main(name: str) -> int:
    # Libraries print what they like: only answers may reach the real standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if "load" in request:
                loaded: Engine = import_module(f"run_{name}").Engine(request["load"])
                engine = loaded
                answer = {"versions": loaded.versions, "settings": loaded.settings}
            elif engine is None:
                answer = {"error": "nothing is loaded"}
            elif "run" in request:
                tokens, times = engine.run(**request["run"])
                answer = {"tokens": tokens, "times": times, "settings": engine.settings}
            else:
                [(method, details)] = request.items()
                answer = getattr(engine, method)(**details)
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {said[0]}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
