"""A program that speaks the protocol of `peers/programs/answer.py` and holds no engine.

`python fake_engine.py BEHAVIOUR`: `good` answers what is asked; the others go wrong in the way of
their name, at the first run unless the name says otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def answer(request: dict[str, Any], behaviour: str) -> dict[str, Any]:
    if "load" in request:
        if behaviour == "error at load":
            return {"error": "MemoryError: no room"}
        if behaviour == "leaves a child":
            code = "import sys; sys.stdin.read()"
            child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
            return {"versions": {"child": str(child.pid)}, "settings": {}}
        return {"versions": {"fake": "1.0"}, "settings": {"asked": request["load"]}}
    if behaviour == "dies":
        print("something broke here\n", file=sys.stderr, flush=True)
        sys.exit(3)
    if behaviour == "is killed":
        os.kill(os.getpid(), 9)
    prompts, num_new = request["run"]["prompts"], request["run"]["num_new"]
    num_new -= behaviour == "one short"
    ids = [[prompt[-1]] * num_new for prompt in prompts]
    times = [[1.0 + 0.5 * i for i in range(num_new)] for _ in prompts]
    return {"tokens": ids, "times": times, "settings": {"ran": True}}


def main(behaviour: str) -> None:
    for line in sys.stdin:
        if behaviour == "silent":
            continue
        if behaviour == "garbage":
            print("Loading weights: 100%", flush=True)
            continue
        print(json.dumps(answer(json.loads(line), behaviour)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
