"""The server that is measured: one that runs already, or one of the benchmark's own."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

import httpx

from momaserve.errors import ConfigError, MomaserveError
from momaserve_bench.serve_options import MODEL_OPTIONS
from momaserve_server.cli_options import model_source

HOST = "127.0.0.1"
POLL_S = 0.1
PROBE_TIMEOUT_S = 5.0
START_TIMEOUT_S = 600.0
"""For loading any checkpoint from a slow disk."""
STOP_TIMEOUT_S = 30.0
LINES_SHOWN = 5


class TargetError(MomaserveError):
    """The server that was to be measured does not answer, or ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server that is ready, and what it says of its model."""

    url: str
    headers: dict[str, str]
    model: str
    card: dict[str, Any]


@contextmanager
def target_of(args: argparse.Namespace) -> Iterator[Target]:
    """The server at `--base-url`, or a fresh one that ends with the block.

    Raises:
        ConfigError: arguments that contradict each other.
        TargetError: the server is not ready, or could not start.
    """
    if not args.ready_check >= 0:
        raise ConfigError(f"--ready-check must be at least 0 s, got {args.ready_check:g}")
    if args.base_url is None:
        with own_server(args) as url:
            yield _described(url, {}, args.model)
        return
    _check_unused(args)
    url = checked_url(args.base_url)
    key: str | None = args.api_key
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError("--api-key must be printable ASCII")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    wait_until_ready(url, args.ready_check)
    yield _described(url, headers, args.model)


def _check_unused(args: argparse.Namespace) -> None:
    """Raises ConfigError for a model or setting that would have no effect."""
    if args.offline_baseline:
        return
    if args.checkpoint is not None or args.preset is not None:
        raise ConfigError(
            "--base-url is a server that has its model: CHECKPOINT and --preset go with it only "
            "for --offline-baseline"
        )
    for option in MODEL_OPTIONS:
        in_environment = os.environ.get(option.environment_name)
        if getattr(args, option.dest) is not None and not in_environment:
            raise ConfigError(f"--base-url is a server that has its settings: drop {option.flag}")


def checked_url(text: str) -> str:
    """A server's address without "/" or "/v1" at its end.

    Raises:
        ConfigError: it is no http(s) URL.
    """
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--base-url {text!r} is no URL: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"--base-url must be like http://127.0.0.1:8000, got {text!r}")
    return text.rstrip("/").removesuffix("/v1")


def wait_until_ready(
    url: str, timeout_s: float, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Asks `/ready` until it says so, once at least.

    Args:
        process: the server, if it is ours; waiting ends when it does.

    Raises:
        TargetError: it does not in time, or has ended.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = httpx.get(f"{url}/ready", timeout=PROBE_TIMEOUT_S)
            reason = f"it answers /ready with {answer.status_code}"
            if answer.status_code == httpx.codes.OK:
                return
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
        if process is not None and process.poll() is not None:
            raise TargetError(
                f"the server ended with code {process.returncode} before it was ready"
            )
        if time.monotonic() >= deadline:
            raise TargetError(f"{url} is not ready after {timeout_s:g} s: {reason}")
        time.sleep(POLL_S)


def _described(url: str, headers: dict[str, str], model: str | None) -> Target:
    try:
        answer = httpx.get(f"{url}/v1/models", headers=headers, timeout=PROBE_TIMEOUT_S)
        answer.raise_for_status()
        cards = {card["id"]: card for card in answer.json()["data"]}
    except httpx.HTTPStatusError as error:
        hint = ": give --api-key" if error.response.status_code == httpx.codes.UNAUTHORIZED else ""
        raise TargetError(
            f"{url}/v1/models answers with {error.response.status_code}{hint}"
        ) from None
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{url}/v1/models does not say what is served: {error!r}") from None
    if not cards or (model is not None and model not in cards):
        raise ConfigError(f"--model {model!r} is not served at {url}, which has {sorted(cards)}")
    name = next(iter(cards)) if model is None else model
    return Target(url=url, headers=headers, model=name, card=cards[name])


@contextmanager
def own_server(args: argparse.Namespace) -> Iterator[str]:
    """The address of a server of the model and with the settings in `args`.

    Raises:
        TargetError: it ended before it was ready; its last words are in the message.
    """
    with tempfile.TemporaryFile() as log, _ended_by_sigterm():
        port = _free_port()
        process = subprocess.Popen(
            [*_command(args), "--port", str(port)],
            # All that is set is in the command; keys of another server are not for this one.
            env={k: v for k, v in os.environ.items() if not k.startswith("MOMASERVE_")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # an interrupt is ours to handle
        )
        try:
            url = f"http://{HOST}:{port}"
            try:
                wait_until_ready(url, START_TIMEOUT_S, process)
            except TargetError as error:
                raise TargetError(f"{error}: {_last_words(log)}") from None
            yield url
        finally:
            _stop(process)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Lets SIGTERM unwind the process, for a server must not outlive its benchmark."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command(args: argparse.Namespace) -> list[str]:
    source = model_source(args)
    words = [sys.executable, "-m", "momaserve_server", "serve"]
    words += ["--preset", source, "--random-weights"] if isinstance(source, str) else [str(source)]
    words += ["--host", HOST, "--log-level", "warning", "--no-access-log"]
    return words + option_words(args)


def option_words(args: argparse.Namespace) -> list[str]:
    """The settings in `args`, wherever they come from, as words of a command line.

    Where nobody limits the queue, it takes all requests of the benchmark.
    """
    in_file: dict[str, Any] = {} if args.config is None else dict(args.config.values)
    words: list[str] = []
    for option in MODEL_OPTIONS:
        value = getattr(args, option.dest)
        value = in_file.get(option.dest) if value is None else value
        if value is None and option.dest == "max_queued_requests":
            value = max(args.num_prompts, option.owner().max_queued_requests)
        if value is None or (option.sets is not None and value != option.sets):
            continue
        words += [option.flag] if option.sets is not None else [option.flag, str(value)]
    return words


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        port: int = listener.getsockname()[1]
        return port


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    lines: Sequence[str] = log.read().decode(errors="replace").splitlines()
    return " | ".join(lines[-LINES_SHOWN:]) or "it said nothing"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
