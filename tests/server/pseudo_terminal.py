"""A program in a terminal of its own: typed to and looked at as by a person.

`pyte` plays the terminal, so a test sees what is on the screen after everything that was drawn
over, scrolled or coloured.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyte

GUARD_S = 30.0
"""Nothing here waits for time to pass; a test that gets here hangs."""
CTRL_C, CTRL_D = "\x03", "\x04"

CHILD = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from momaserve_server.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""Takes the terminal as its own, which makes Ctrl-C a signal."""


def hear_interrupts() -> None:
    """In a child before it runs: a suite that runs in the background may ignore interrupts, which a
    child would inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt_when_waiting(pid: int, interrupt: Callable[[], None]) -> None:
    """Interrupt a process, once it waits for something.

    Before that Python may miss it: a signal that comes between its last look at signals and the
    system call that waits is seen when that call returns. Nobody's fingers are quick enough for
    that, but a test's are.
    """
    deadline = time.monotonic() + GUARD_S
    stat = Path(f"/proc/{pid}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline, "it never waits"
        os.sched_yield()
    interrupt()


class PseudoTerminal:
    """Owns one end of the terminal; the program has the other."""

    def __init__(self, process: subprocess.Popen[bytes], master: int, size: tuple[int, int]):
        self.process = process
        self.written = b""
        """All that the program wrote, as it wrote it."""
        self._master = master
        self._screen = pyte.Screen(*size)
        self._stream = pyte.ByteStream(self._screen)
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, once the program waits for something."""
        interrupt_when_waiting(self.process.pid, lambda: self.type(CTRL_C))

    def until(self, text: str) -> bytes:
        """Reads on until the program wrote `text`; returns what it wrote since the last call."""
        wanted = text.encode()
        deadline = time.monotonic() + GUARD_S
        while (found := self.written.find(wanted, self._seen)) < 0:
            assert self._read(deadline), self.shown()
        start, self._seen = self._seen, found + len(wanted)
        return self.written[start : self._seen]

    def end(self) -> int:
        """Reads to the end; returns the program's exit code."""
        deadline = time.monotonic() + GUARD_S
        while self._read(deadline):
            pass
        return self.process.wait(GUARD_S)

    def shown(self) -> str:
        """What is on the screen now, without empty lines at the end."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    def colors(self, line: int, column: int) -> tuple[str, str]:
        """Of the character there: its own and the one behind it, as pyte writes them."""
        cell = self._screen.buffer[line][column]
        return cell.fg, cell.bg

    def _read(self, deadline: float) -> bool:
        """False at the end."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing more came:\n{self.shown()}\n{self.written[-500:]!r}"
        try:
            data = os.read(self._master, 65536)
        except OSError:  # how Linux says that nobody has the other end any more
            data = b""
        self.written += data
        self._stream.feed(data)
        return bool(data)


@contextmanager
def terminal(
    words: Sequence[str],
    *,
    directory: Path,
    environment: Mapping[str, str] | None = None,
    columns: int = 80,
    lines: int = 24,
) -> Generator[PseudoTerminal, None, None]:
    """`momaserve` with these arguments, in a terminal with 24-bit colours unless told otherwise.

    Args:
        directory: where it runs.
        environment: added to a bare one; an empty value takes a variable away.
    """
    settings = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "LANG": "C.UTF-8",
        "HOME": str(directory),
        **(environment or {}),
    }
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=directory,
            env={name: value for name, value in settings.items() if value},
            start_new_session=True,
            preexec_fn=hear_interrupts,
        )
    finally:
        os.close(slave)
    try:
        yield PseudoTerminal(process, master, (columns, lines))
    finally:
        process.kill()
        process.wait(GUARD_S)
        os.close(master)
