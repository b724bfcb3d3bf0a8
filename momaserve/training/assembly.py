"""Puts a checkpoint together: what serving needs beside the weights, and how it was made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from momaserve.models.config import read_json_object
from momaserve.training.run import logged_seconds, write_atomically

STAGES_FILE = "training.json"


def assemble(
    out: Path,
    *,
    chat_template: str,
    generation: Mapping[str, Any],
    image_tokenizer: Path | None,
) -> None:
    """Write chat template, sampling defaults (if any) and image tokenizer (if any) into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "chat_template.jinja", chat_template)
    if generation:
        text = json.dumps(generation, indent=2) + "\n"
        write_atomically(out / "generation_config.json", text)
    if image_tokenizer is not None:
        install_image_tokenizer(image_tokenizer, out)


def install_image_tokenizer(source: Path, checkpoint: Path) -> None:
    """Copy a trained image tokenizer into a checkpoint."""
    target = checkpoint / "image_tokenizer"
    target.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, target / f"{name}.tmp")
        (target / f"{name}.tmp").replace(target / name)


def keep_text_tokenizer(source: Path, out: Path) -> None:
    """A model goes on with the words that it has: copy tokenizer.json, where `out` has none."""
    if (source / "tokenizer.json").exists() and not (out / "tokenizer.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        text = (source / "tokenizer.json").read_text(encoding="utf-8")
        write_atomically(out / "tokenizer.json", text)


def record_stage(checkpoint: Path, stage: str, run: Path) -> None:
    """Keep the configuration and the time of a finished run in the checkpoint's training.json."""
    _record(checkpoint, stage, {"minutes": round(logged_seconds(run) / 60, 1), **_config_of(run)})


def record_seed(checkpoint: Path, seed: Path) -> None:
    """Keep how the weights that a run began with were made, as far as they say so."""
    if (seed / STAGES_FILE).exists():
        _record(checkpoint, "began_with", read_json_object(seed / STAGES_FILE))


def _config_of(run: Path) -> dict[str, Any]:
    return read_json_object(run / "run.json")


def _record(checkpoint: Path, stage: str, facts: Mapping[str, Any]) -> None:
    path = checkpoint / STAGES_FILE
    stages = read_json_object(path) if path.exists() else {}
    stages[stage] = dict(facts)
    write_atomically(path, json.dumps(stages, indent=2) + "\n")
