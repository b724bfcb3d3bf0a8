"""One engine in a process of its own: a line of JSON in, a line of JSON out."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from momaserve_bench.peers.engines import Launch

_GRACE_S = 10.0
"""For an engine to end by itself when its input does."""


class EngineFailure(Exception):
    """An engine died, went silent, or said that something went wrong; one clear line."""


class EngineProcess:
    """Owns the process and everything that it starts; use it as a context manager.

    The engine's own messages go to `log`. After an EngineFailure that is not an answer the process
    is gone.
    """

    def __init__(self, launch: Launch, log: Path, timeout_s: float) -> None:
        """Raises EngineFailure when the program cannot be started."""
        self.name = launch.name
        self._timeout_s = timeout_s
        self._log = log
        self._unread = b""
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as errors:
                self._process = subprocess.Popen(
                    launch.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env={**os.environ, **launch.variables},
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineFailure(f"{self.name} cannot be started: {error}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input: IO[bytes] = self._process.stdin
        self._output: IO[bytes] = self._process.stdout

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            EngineFailure: no answer, or one that says what went wrong.
        """
        if self._input.closed:
            raise self._death()
        try:
            self._input.write(json.dumps(request).encode() + b"\n")
            self._input.flush()
        except OSError:
            raise self._death() from None
        line = self._read_line()
        try:
            answer = json.loads(line)
        except ValueError:
            raise EngineFailure(f"{self.name} answered {line[:80]!r}, which is no JSON") from None
        if not isinstance(answer, dict):
            raise EngineFailure(f"{self.name} answered {line[:80]!r}, which is no object")
        if "error" in answer:
            raise EngineFailure(f"{self.name}: {answer['error']} (see {self._log})")
        return answer

    def _read_line(self) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.close(grace_s=0)
                    raise EngineFailure(
                        f"{self.name} did not answer within {self._timeout_s:g} s and was stopped"
                    )
                read = os.read(self._output.fileno(), 1 << 16)
                if not read:
                    raise self._death()
                self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _death(self) -> EngineFailure:
        self.close()
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return EngineFailure(f"{self.name} died ({how}): {said[:200]}")

    def cpu_seconds(self) -> float | None:
        """CPU time that the process and what it started have used; None if nobody tells."""
        ticks = 0
        entries = list(Path("/proc").glob("[0-9]*/stat"))
        for entry in entries:
            try:
                fields = entry.read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[3]) == self._process.pid:  # its session
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK") if entries else None

    def close(self, grace_s: float = _GRACE_S) -> None:
        """End the process and what it started; does nothing the second time."""
        if self._output.closed:
            return
        with suppress(OSError):  # it was gone, with something unsent
            self._input.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with suppress(ProcessLookupError):  # nothing is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()
