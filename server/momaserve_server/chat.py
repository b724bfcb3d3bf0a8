"""`momaserve chat`: talks to a server over HTTP, in a conversation or for one answer.

Text goes to standard output as it comes, pictures to files, and into the terminal if it has
colours. Prompts are kept nowhere but in this process.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import cast

from momaserve.errors import ConfigError, MomaserveError, PromptError, SamplingError
from momaserve_server.chat_files import FileError
from momaserve_server.chat_options import DEFAULT_URL, FIELDS, KEY_VARIABLE
from momaserve_server.chat_view import View, can_encode, printable
from momaserve_server.half_blocks import Colors, terminal_colors

try:
    from momaserve_client import (
        AuthenticationError,
        BadReplyError,
        BadRequestError,
        Client,
        ClientError,
        InvalidPromptError,
        Model,
        NotConnectedError,
        NotFoundError,
        Options,
        Retries,
    )
    from momaserve_server.chat_session import Conversation, Session
    from momaserve_server.chat_terminal import Terminal
except ModuleNotFoundError as error:
    if error.name != "momaserve_client":
        raise
    raise MomaserveError(
        "the package momaserve-client is missing: pip install momaserve-client"
    ) from None

FAILED = 1
NOTICED_S = 1.5
"""A wait of at least this long is told."""


def run(args: argparse.Namespace) -> int:
    """Talks until the user leaves, or answers once; returns the exit code.

    Raises:
        ConfigError, SamplingError: arguments that cannot work.
        MomaserveError: no server, no answer, or a file that cannot be read or written.
    """
    is_conversation = args.prompt is None and sys.stdin.isatty()
    view = make_view()
    prompt = "" if is_conversation else given_prompt(args)
    check_texts(args.system, *args.stop or ())
    make_directory(args.out)
    tell = view.line if is_conversation else tell_on_stderr
    try:
        with connected(args, Retries(max_retries=0), tell) as client:
            model = served_model(client, args.model)
        with connected(args, Retries(), tell) as client:
            session = Session(
                client,
                model,
                Conversation(args.system),
                view,
                tell=tell,
                directory=args.out,
                options=request_options(args),
                modalities=args.modalities,
            )
            for path in args.image:
                session.attach(path)
            if is_conversation:
                return Terminal(session, view, lambda error: told(error, args)).run(args.url)
            return answer_once(session, view, prompt)
    except ClientError as error:
        view.end_line()
        raise as_ours(error, args) from error
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def answer_once(session: Session, view: View, prompt: str) -> int:
    try:
        session.ask(prompt)
    except KeyboardInterrupt:
        view.interrupted()
        raise
    return 0 if session.has_saved_all else FAILED


def make_view() -> View:
    """What standard output can show."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="replace")
    is_terminal = out.isatty()
    colors = terminal_colors(os.environ, is_terminal=is_terminal)
    return View(out, colors if can_encode(out) else Colors.NONE, is_terminal=is_terminal)


def tell_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def given_prompt(args: argparse.Namespace) -> str:
    """PROMPT, or else all of standard input.

    Raises:
        ConfigError: there is nothing to ask.
        PromptError: standard input is no text.
    """
    try:
        prompt: str = sys.stdin.read() if args.prompt is None else args.prompt
    except UnicodeDecodeError:
        raise PromptError("standard input is not UTF-8 text") from None
    check_texts(prompt)
    if not prompt.strip() and not args.image:
        raise ConfigError("the prompt is empty: give PROMPT, or text on standard input")
    return prompt.removesuffix("\n")


def check_texts(*texts: str | None) -> None:
    """Raises ConfigError for arguments of bytes that are no UTF-8."""
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise ConfigError("an argument is not UTF-8 text") from None


def make_directory(path: Path) -> None:
    """Raises FileError if there can be no such directory."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(path, error) from None


def connected(args: argparse.Namespace, retries: Retries, tell: Callable[[str], None]) -> Client:
    """Raises ConfigError for an address or a key that cannot be."""

    def wait(seconds: float) -> None:
        if seconds >= NOTICED_S:
            tell(f"the server is busy: trying again in {seconds:.0f} s")
        sleep(seconds)

    try:
        return Client(args.url or DEFAULT_URL, api_key=args.api_key, retries=retries, sleep=wait)
    except ValueError as error:
        raise ConfigError(str(error).replace("base_url", "--url")) from None


def served_model(client: Client, name: str | None) -> Model:
    """The model to talk to. Raises MomaserveError if there is none of that name."""
    models = client.models()
    for model in models:
        if name in (None, model.id):
            return model
    there = ", ".join(repr(model.id) for model in models) or "none"
    raise MomaserveError(f"the model {name!r} is not served there; there is {there}")


def request_options(args: argparse.Namespace) -> Options:
    names = ("model", "stop", "routing", *(field.name for field in FIELDS))
    given = {name: getattr(args, name) for name in names}
    return cast(Options, {name: value for name, value in given.items() if value is not None})


def as_ours(error: ClientError, args: argparse.Namespace) -> MomaserveError:
    """The error that makes `momaserve` end with the right exit code."""
    is_usage = isinstance(error, BadRequestError) and not isinstance(error, InvalidPromptError)
    return (SamplingError if is_usage else MomaserveError)(told(error, args))


def told(error: ClientError, args: argparse.Namespace) -> str:
    """One line, with what to do about it where that is known."""
    url = args.url or DEFAULT_URL
    text = printable(" ".join(str(error).split()))
    if isinstance(error, NotConnectedError):
        if args.url is None:
            return f"no server answers at {url}: start one with 'momaserve serve', or give --url"
        return f"no server answers at {url}: {text}"
    if isinstance(error, AuthenticationError):
        return f"{text}: give its key in {KEY_VARIABLE} or as --api-key"
    if type(error) in (NotFoundError, BadReplyError):
        return f"{url} does not answer like a momaserve server: {text}"
    return text
