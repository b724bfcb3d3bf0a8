"""`momaserve generate`: one prompt, answered in this process. Text to stdout, pictures to files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from momaserve.engine import Engine
from momaserve.errors import MomaserveError, PromptError, SamplingError
from momaserve.llm import LLM
from momaserve.sampling import Distribution, OutputMode, SamplingParams
from momaserve.tokens.image import ImageLimits, open_image
from momaserve_server.cli_options import engine_config, model_source
from momaserve_server.errors import GenerationFailedError
from momaserve_server.generate_options import DEFAULT_OUT
from momaserve_server.pictures import png_bytes, require_pixels

GIVEN = (
    "n",
    "seed",
    "max_tokens",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "guidance_scale",
)
"""Options that are fields of `SamplingParams` as they stand; the default is its own."""


class OutputError(MomaserveError):
    """A picture cannot be written to its file."""


def run(args: argparse.Namespace) -> int:
    """Answers the prompt in `args`; returns the exit code."""
    if args.prompt is None and not args.image:
        raise SamplingError("give --prompt, --image or both", param="prompt")
    pictures = [read_picture(path) for path in args.image]
    config = engine_config(args)
    mode = OutputMode(args.mode)
    given = {name: getattr(args, name) for name in GIVEN if getattr(args, name) is not None}
    asked = SamplingParams(mode=mode, stop=tuple(args.stop), **given)
    llm = LLM(Engine.load(model_source(args), config))
    if mode is not OutputMode.TEXT:
        require_pixels(llm.engine.processor)
    defaults = llm.engine.defaults
    params = replace(
        asked,
        text=_changed(defaults.text, args, ""),
        image=_changed(defaults.image, args, "image_"),
        guidance_scale=given.get("guidance_scale", defaults.guidance_scale),
    )
    parts = (*pictures, *([] if args.prompt is None else [args.prompt]))
    result = llm.generate(parts, params)[0]
    for choice in result.choices:
        if choice.error is not None:
            raise GenerationFailedError(choice.error)
    for choice in result.choices:
        if choice.text or mode is OutputMode.TEXT:
            print(choice.text)
    for path in save_pictures([im for choice in result.choices for im in choice.images], args.out):
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _changed(defaults: Distribution, args: argparse.Namespace, prefix: str) -> Distribution:
    names = ("temperature", "top_k", "top_p")
    given = {name: getattr(args, prefix + name) for name in names}
    return replace(defaults, **{name: v for name, v in given.items() if v is not None})


def read_picture(path: Path) -> Image.Image:
    """Raises PromptError naming the file."""
    try:
        return open_image(path.read_bytes(), ImageLimits())
    except OSError as error:
        raise PromptError(f"{path}: {error.strerror or error}") from None
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from None


def save_pictures(pictures: Sequence[Image.Image], out: Path) -> list[Path]:
    """Write PNG files, each whole or not at all; returns their paths.

    Raises:
        OutputError: a file cannot be written.
    """
    if out.is_dir():
        out = out / DEFAULT_OUT
    numbered = [out.with_stem(f"{out.stem}-{i + 1}") for i in range(len(pictures))]
    paths = [out] if len(pictures) == 1 else numbered
    for picture, path in zip(pictures, paths, strict=True):
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            partial.write_bytes(png_bytes(picture))
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
    return paths
