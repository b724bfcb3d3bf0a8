"""Arguments of `momaserve chat`; `chat.py` carries it out.

Imports nothing heavy, nor the client: `--help` must be quick and always there.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from momaserve.config import SERVABLE_POLICIES
from momaserve_server.settings import ServerSettings

DEFAULT_URL = f"http://{ServerSettings().host}:{ServerSettings().port}"
KEY_VARIABLE = "MOMASERVE_API_KEY"
MODES = {"text": ("text",), "image": ("image",), "both": ("text", "image")}
"""Words of `/mode`, and the modalities that they stand for."""


@dataclass(frozen=True, slots=True)
class Field:
    """An option that is a field of the request, as `docs/api.md` describes it."""

    name: str
    type: Callable[[str], Any]
    metavar: str
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


FIELDS = (
    Field("seed", int, "N", "fixes the random choices (default: fresh ones)"),
    Field("max_tokens", int, "N", "longest answer, in tokens (default: no limit)"),
    Field("min_tokens", int, "N", "shortest answer, in tokens (default: 0)"),
    Field("temperature", float, "T", "of text tokens; 0 is greedy"),
    Field("top_k", int, "K", "likeliest text tokens to choose from"),
    Field("top_p", float, "P", "share of text probability to keep"),
    Field("min_p", float, "P", "least text probability, as a share of the likeliest token's"),
    Field("image_temperature", float, "T", "of picture tokens; 0 is greedy"),
    Field("image_top_k", int, "K", "likeliest picture tokens to choose from"),
    Field("image_top_p", float, "P", "share of picture probability to keep"),
    Field("guidance_scale", float, "G", "how closely pictures follow the prompt; 1 is no guidance"),
    Field("repetition_penalty", float, "P", "on text tokens that are in prompt or answer"),
    Field("presence_penalty", float, "P", "on text tokens that are in the answer"),
    Field("frequency_penalty", float, "P", "the same, by how often"),
    Field("timeout_s", float, "S", "seconds after which an answer is cut off"),
)
"""Sent only if given: the defaults are the server's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Without PROMPT, at a terminal: a conversation, with /help. Otherwise one answer: text to "
        "standard output, the paths of pictures to standard error. Nothing is logged."
    )
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="what to ask (default: standard input)"
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url", metavar="URL", help=f"address of the server (default: {DEFAULT_URL})"
    )
    server.add_argument("--model", metavar="NAME", help="a served model (default: the only one)")
    server.add_argument(
        "--api-key",
        metavar="KEY",
        default=_key_of(os.environ),
        help=f"better in the environment, as {KEY_VARIABLE}: others can see command lines",
    )
    request = parser.add_argument_group("request")
    request.add_argument(
        "--modalities",
        type=_modalities,
        metavar="LIST",
        help="what answers may hold: text, image or text,image (default: all that the model can)",
    )
    request.add_argument(
        "--image",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="a picture to put before the first prompt; may be given several times",
    )
    request.add_argument("--system", metavar="TEXT", help="what the model is told first")
    request.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="ends an answer where it occurs; may be given several times",
    )
    for field in FIELDS:
        request.add_argument(field.flag, type=field.type, metavar=field.metavar, help=field.help)
    request.add_argument(
        "--routing",
        choices=[str(policy) for policy in SERVABLE_POLICIES],
        help="how tokens find their experts (default: the server's)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where pictures are written, made if need be; no file is overwritten "
        "(default: the current directory)",
    )


def _key_of(environment: Mapping[str, str]) -> str | None:
    """The first, since a server's own variable may hold several with commas between them."""
    return environment.get(KEY_VARIABLE, "").partition(",")[0].strip() or None


def _modalities(text: str) -> tuple[str, ...]:
    given = {word.strip() for word in text.split(",")}
    for modalities in MODES.values():
        if given == set(modalities):
            return modalities
    raise argparse.ArgumentTypeError(f"{text!r} is not text, image or text,image")
