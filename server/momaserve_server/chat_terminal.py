"""The conversation at a terminal: prompt, commands, interrupts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from glob import escape, glob
from importlib import import_module
from pathlib import Path

from momaserve.errors import MomaserveError
from momaserve_client import ClientError, InvalidPromptError
from momaserve_server.chat_files import FileError, save_conversation
from momaserve_server.chat_options import DEFAULT_URL, MODES
from momaserve_server.chat_session import Session
from momaserve_server.chat_view import View

PROMPT = "> "
COMMANDS = {
    "/help": ("", "this list"),
    "/reset": ("", "forget what was said"),
    "/image": ("PATH", "put a picture before the next message"),
    "/mode": ("text|image|both", "what answers may hold"),
    "/save": ("FILE", "write the conversation as JSON"),
    "/quit": ("", "leave; Ctrl-D does too"),
}
"""Their arguments, and what they do."""


class Terminal:
    """Reads lines and does what they say. Owns nothing of the conversation itself."""

    def __init__(self, session: Session, view: View, told: Callable[[ClientError], str]) -> None:
        """
        Args:
            told: one line about an error.
        """
        self._session = session
        self._view = view
        self._told = told
        self._is_over = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/image": self._image,
            "/mode": self._mode,
            "/save": self._save,
            "/quit": self._quit,
        }

    def run(self, url: str | None) -> int:
        """Until the user leaves; returns the exit code.

        Raises:
            KeyboardInterrupt: that is how the user left.
        """
        use_readline()
        makes = "text and pictures" if self._session.can_draw else "text"
        model = self._session.model.id
        self._view.line(f"{model} at {url or DEFAULT_URL}: {makes}. /help lists the commands.")
        was_interrupted = False
        while not self._is_over:
            try:
                line = read_line()
            except KeyboardInterrupt:
                self._view.interrupted()
                if was_interrupted:
                    raise
                was_interrupted = True
                self._view.line("Ctrl-C again, or Ctrl-D, leaves")
                continue
            was_interrupted = False
            if line is None:
                self._view.line("")
                break
            try:
                self._do(line)
            except KeyboardInterrupt:
                was_interrupted = True
                self._view.interrupted()
                self._view.line("stopped; Ctrl-C again leaves")
        return 0

    def _do(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        try:
            if not line.strip():
                return
            if not line.startswith("/"):
                self._session.ask(line.strip())
            elif name in self._commands:
                self._commands[name](argument.strip())
            else:
                self._view.line(
                    f"no command {name}: /help lists them; a space before it makes it a message"
                )
        except InvalidPromptError as error:
            self._view.line(f"error: {self._told(error)} (/reset starts over)")
        except ClientError as error:
            self._view.line(f"error: {self._told(error)}")
        except MomaserveError as error:
            self._view.line(f"error: {error}")

    def _help(self, argument: str) -> None:
        for name, (takes, what) in COMMANDS.items():
            self._view.line(f"{f'{name} {takes}':<22} {what}")
        self._view.line("Ctrl-C stops an answer; a second one, at the prompt, leaves.")

    def _reset(self, argument: str) -> None:
        self._session.conversation.forget()
        self._view.line("a new conversation")

    def _image(self, argument: str) -> None:
        self._session.attach(_path(argument))
        num = len(self._session.conversation.pictures)
        what = "a picture goes" if num == 1 else f"{num} pictures go"
        self._view.line(f"{what} with your next message")

    def _mode(self, argument: str) -> None:
        if argument in MODES:
            self._session.modalities = MODES[argument]
        mode = next(name for name, it in MODES.items() if it == self._session.modalities)
        is_known = not argument or argument in MODES
        self._view.line(f"mode is {mode}" if is_known else f"mode is one of {', '.join(MODES)}")

    def _save(self, argument: str) -> None:
        path = _path(argument)
        messages = self._session.conversation.messages()
        save_conversation({"model": self._session.model.id, "messages": messages}, path)
        self._view.line(f"wrote {path}")

    def _quit(self, argument: str) -> None:
        self._is_over = True


def _path(argument: str) -> Path:
    """Raises FileError if none is given."""
    words = argument
    if len(words) > 1 and words[0] == words[-1] and words[0] in "'\"":
        words = words[1:-1]  # as a shell, or dragging a file into the terminal, writes them
    if not words:
        raise FileError(Path(), "give the path of a file")
    path = Path(words)
    try:
        return path.expanduser()
    except RuntimeError:  # no such user
        return path


def read_line() -> str | None:
    """A line of standard input; None at its end. Raises KeyboardInterrupt."""
    try:
        if sys.stdout.isatty():
            return input(PROMPT)
        print(PROMPT, end="", file=sys.stderr, flush=True)
        return input()
    except EOFError:
        return None
    except UnicodeDecodeError:
        return ""


def use_readline() -> None:
    """Editing, history and completion, where Python has readline. Nothing goes into a file."""
    try:
        readline = import_module("readline")
    except ImportError:
        return
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    readline.set_completer_delims(" \t")

    def complete(word: str, number: int) -> str | None:
        found = completions(readline.get_line_buffer(), word)
        return found[number] if number < len(found) else None

    readline.set_completer(complete)


def completions(line: str, word: str) -> list[str]:
    """What `word`, the last of `line`, may become: a command, its mode, or a path."""
    command, space, _ = line.lstrip().partition(" ")
    if not space:
        return [name for name in COMMANDS if word and name.startswith(word)]
    if command == "/mode":
        return [mode for mode in MODES if mode.startswith(word)]
    if command not in ("/image", "/save"):
        return []
    home = str(Path(word).expanduser()) if word.startswith("~/") else word
    found = sorted(glob(escape(home) + "*"))
    return [f"{path}/" if Path(path).is_dir() else path for path in found]
