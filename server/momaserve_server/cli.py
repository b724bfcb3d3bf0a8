"""The `momaserve` command. Loads a subcommand's package only when it is chosen.

Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted. A user's mistake is one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from momaserve import __version__
from momaserve.errors import ConfigError, MomaserveError, SamplingError

FAILED = 1
BAD_USAGE = 2
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand as two modules: one is light and knows the arguments, one does the work."""

    help: str
    module: str
    """Has `run(args) -> int`."""
    arguments: str = ""
    """`module:function` that adds arguments to a parser; left out, `module:add_arguments`."""


_TRAINING = "momaserve.training.commands.options"
COMMANDS = {
    "serve": Command(
        "serve a checkpoint over HTTP, with a playground page",
        "momaserve_server.serving",
        "momaserve_server.serve_options:add_arguments",
    ),
    "generate": Command(
        "answer one prompt here, without a server; pictures become PNG files",
        "momaserve_server.generate",
        "momaserve_server.generate_options:add_arguments",
    ),
    "chat": Command(
        "talk to a running server; pictures are drawn in the terminal and become PNG files",
        "momaserve_server.chat",
        "momaserve_server.chat_options:add_arguments",
    ),
    "info": Command("parameters, bytes and FLOPs of a checkpoint", "momaserve_server.command_info"),
    "export": Command(
        "write a checkpoint in another number format or in shards",
        "momaserve_server.command_export",
    ),
    "bench": Command(
        "measure the engine",
        "momaserve_bench.command",
        "momaserve_bench.options:add_arguments",
    ),
    "eval-demo": Command(
        "quality of the demo", "momaserve.training.commands.eval_demo", f"{_TRAINING}:eval_demo"
    ),
    "train": Command("train a model", "momaserve.training.commands.train", f"{_TRAINING}:train"),
    "upcycle": Command(
        "train on with one expert per modality as several",
        "momaserve.training.commands.upcycle",
        f"{_TRAINING}:upcycle",
    ),
    "train-image-tokenizer": Command(
        "train pixels <-> codes",
        "momaserve.training.commands.train_image_tokenizer",
        f"{_TRAINING}:train_image_tokenizer",
    ),
    "fit-routers": Command(
        "train auxiliary routers of a frozen model",
        "momaserve.training.commands.fit_routers",
        f"{_TRAINING}:fit_routers",
    ),
    "router-report": Command(
        "what causal routing costs a checkpoint, as tables and plots",
        "momaserve.router_lab.command",
        "momaserve.router_lab.options:add_arguments",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` names; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ConfigError, SamplingError) as error:
        return _fail(words[0], str(error), BAD_USAGE)
    except MomaserveError as error:
        return _fail(words[0], str(error), FAILED)


def _run(words: list[str]) -> int:
    if not words:
        _overview().print_help(sys.stderr)
        return BAD_USAGE
    if words[0] not in COMMANDS:
        _overview().parse_args(words)  # prints and exits, or finds the mistake and exits
    name, command = words[0], COMMANDS[words[0]]
    parser = argparse.ArgumentParser(
        prog=f"momaserve {name}", description=f"{command.help[0].upper()}{command.help[1:]}."
    )
    try:
        home, _, function = (command.arguments or f"{command.module}:add_arguments").partition(":")
        getattr(import_module(home), function)(parser)
        args = parser.parse_args(words[1:])
        code: int = import_module(command.module).run(args)
    except ModuleNotFoundError as error:
        return _fail(name, f"needs the Python package {error.name!r}: {error}", FAILED)
    return code


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="momaserve",
        description="Serve and train modality-aware sparse models: text and pictures, one model.",
        epilog="'momaserve COMMAND --help' shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"momaserve {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help)
    return parser


def _fail(name: str, message: str, code: int) -> int:
    print(f"momaserve {name}: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
