"""One engine's process: answers, and every way in which it can go wrong, said clearly."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from momaserve_bench.peers.engine_process import EngineFailure, EngineProcess
from momaserve_bench.peers.engines import Launch, launch

_FAKE = Path(__file__).parent / "fake_engine.py"
_ANSWER = Path(launch("momaserve", 1, Path("peers")).command[1])
_RUN = {"run": {"prompts": [[7, 8], [9, 10]], "num_new": 3, "pictures": [False, False]}}


def start(tmp_path: Path, behaviour: str, timeout_s: float = 60.0) -> EngineProcess:
    command = (sys.executable, str(_FAKE), behaviour)
    one = Launch(name="fake", command=command, variables={"FAKE": "1"})
    return EngineProcess(one, tmp_path / "logs" / "fake.log", timeout_s)


def test_requests_are_answered_one_by_one(tmp_path: Path) -> None:
    with start(tmp_path, "good") as process:
        assert process.ask({"load": {"threads": 2}})["settings"] == {"asked": {"threads": 2}}
        answer = process.ask(_RUN)
        assert answer["tokens"] == [[8, 8, 8], [10, 10, 10]]
        assert answer["times"] == [[1.0, 1.5, 2.0]] * 2
        assert process.ask(_RUN) == answer


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("dies", r"^fake died \(exit status 3\): something broke here$"),
        ("is killed", r"^fake died \(signal SIGKILL\): it said nothing$"),
        ("garbage", r"^fake answered b'Loading weights: 100%', which is no JSON$"),
    ],
)
def test_a_failure_is_one_clear_line(tmp_path: Path, behaviour: str, message: str) -> None:
    with start(tmp_path, behaviour) as process, pytest.raises(EngineFailure, match=message):
        process.ask(_RUN)


def test_an_engine_can_say_what_went_wrong_and_goes_on(tmp_path: Path) -> None:
    with start(tmp_path, "error at load") as process:
        with pytest.raises(EngineFailure, match=r"^fake: MemoryError: no room \(see .*fake.log\)$"):
            process.ask({"load": {}})
        assert len(process.ask(_RUN)["tokens"]) == 2


def test_silence_ends_at_the_time_limit(tmp_path: Path) -> None:
    message = r"^fake did not answer within 0\.2 s and was stopped$"
    with start(tmp_path, "silent", timeout_s=0.2) as process:
        with pytest.raises(EngineFailure, match=message):
            process.ask(_RUN)
        with pytest.raises(EngineFailure, match=r"died \(signal SIGKILL\)"):
            process.ask(_RUN)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    one = Launch(name="fake", command=(str(tmp_path / "python"),), variables={})
    with pytest.raises(EngineFailure, match="fake cannot be started: .*No such file"):
        EngineProcess(one, tmp_path / "fake.log", 1.0)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file", encoding="utf-8")
    with pytest.raises(EngineFailure, match="fake cannot be started: "):
        start(tmp_path, "good")


def test_cpu_time_is_that_of_the_process(tmp_path: Path) -> None:
    with start(tmp_path, "good") as process:
        process.ask({"load": {}})
        used = process.cpu_seconds()
        assert used is not None and 0 <= used < os.times().elapsed


def test_nothing_of_an_engine_is_left_over(tmp_path: Path) -> None:
    process = start(tmp_path, "leaves a child")
    child = int(process.ask({"load": {}})["versions"]["child"])
    ended = os.pidfd_open(child)  # readable once the child is gone
    try:
        assert select.select([ended], [], [], 0)[0] == []
        process.close()
        process.close()  # does nothing
        assert select.select([ended], [], [], 60)[0] == [ended]
    finally:
        os.close(ended)


def answers(lines: list[dict[str, Any]], engine_code: str, tmp_path: Path) -> list[dict[str, Any]]:
    """What answer.py says when `run_toy` is this code."""
    program = tmp_path / "answer.py"
    program.write_text(_ANSWER.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "run_toy.py").write_text(engine_code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(program), "toy"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


_TOY = """
import os

class Engine:
    def __init__(self, job):
        print("a library prints this")
        os.write(1, b"and C code that\\n")
        self.versions, self.settings = {"toy": "2"}, dict(job)

    def run(self, prompts, num_new, pictures):
        if not prompts:
            raise ValueError("no prompts\\nat all")
        return [[1] * num_new for _ in prompts], [[0.5] * num_new for _ in prompts]

    def told(self, what):
        return {"told": what}
"""


def test_the_real_program_keeps_standard_output_for_answers(tmp_path: Path) -> None:
    nothing = {"run": {"prompts": [], "num_new": 1, "pictures": []}}
    more: list[dict[str, Any]] = [{"told": {"what": 3}}, {"asked": {}}]
    got = answers([_RUN, {"load": {"a": 1}}, _RUN, nothing, *more], _TOY, tmp_path)
    assert got == [
        {"error": "nothing is loaded"},
        {"versions": {"toy": "2"}, "settings": {"a": 1}},
        {"tokens": [[1, 1, 1]] * 2, "times": [[0.5, 0.5, 0.5]] * 2, "settings": {"a": 1}},
        {"error": "ValueError: no prompts"},
        {"told": 3},
        {"error": "AttributeError: 'Engine' object has no attribute 'asked'"},
    ]
