"""A program that speaks the protocol of `peers/programs/answer.py` as momaserve does; no engine.

`python fake_architecture.py BEHAVIOUR`: `good` answers; another is the request at which it dies,
such as `run` or `touched`. A model's token takes as many seconds as `SECONDS` says, which depends
on its experts alone, so all that is reported can be computed by hand.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SECONDS = {"dense": 1.0, "moe-8x": 2.0, "1t1i": 1.25, "4t4i": 4.0}
STEP_BYTES = {"dense": 100.0, "moe-8x": 300.0, "1t1i": 125.0, "4t4i": 400.0}
RESIDENT_BYTES = {"dense": 1000, "moe-8x": 4000, "1t1i": 1500, "4t4i": 5000}


def answer(request: dict[str, Any], experts: str) -> dict[str, Any]:
    if "load" in request:
        return {"versions": {"fake": "1"}, "settings": request["load"]}
    if "memory" in request:
        size = RESIDENT_BYTES[experts]
        return {"resident_bytes": size, "peak_resident_bytes": 2 * size}
    if "touched" in request:
        total = STEP_BYTES[experts]
        return {"bytes_per_step": total, "parts": {"head": total}, "distinct_experts": {"all": 2.0}}
    prompts, num_new = request["run"]["prompts"], request["run"]["num_new"]
    times = [SECONDS[experts] * (i + 1) for i in range(num_new)]
    return {
        "tokens": [[9000] * num_new for _ in prompts],
        "times": [times for _ in prompts],
        "settings": {"ran": True},
    }


def main(behaviour: str) -> None:
    experts = ""
    for line in sys.stdin:
        request = json.loads(line)
        if behaviour in request:
            print("out of luck", file=sys.stderr, flush=True)
            sys.exit(3)
        if "load" in request:
            experts = request["load"]["model"].split("-", 2)[2]
        print(json.dumps(answer(request, experts)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
