"""`momaserve router-report`: runs what is not there yet, and writes the report."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from momaserve.environment import machine
from momaserve.errors import CheckpointError, ConfigError, DataError
from momaserve.models.config import ModelConfig
from momaserve.models.weights import load_model, weight_files
from momaserve.router_lab.findings import findings
from momaserve.router_lab.options import PARTS
from momaserve.router_lab.page import write_page
from momaserve.router_lab.passes import Lab
from momaserve.router_lab.plots import draw_all
from momaserve.router_lab.progress import Progress
from momaserve.router_lab.source import LabData, open_source
from momaserve.router_lab.statistics import Bootstrap
from momaserve.router_lab.store import FORMAT, Store, plain
from momaserve.router_lab.studies.better_routers import study_better_routers
from momaserve.router_lab.studies.generation import study_generation
from momaserve.router_lab.studies.noise import study_noise
from momaserve.router_lab.studies.policies import study_policies
from momaserve.router_lab.studies.shift import study_shift
from momaserve.router_lab.studies.thresholds import study_thresholds
from momaserve.router_lab.study import Settings, Study
from momaserve.training.commands.common import set_up
from momaserve.training.run import write_atomically

_STUDIES: Mapping[str, Callable[[Study], dict[str, Any]]] = dict(
    zip(
        PARTS,
        (
            study_policies,
            study_noise,
            study_thresholds,
            study_shift,
            study_generation,
            study_better_routers,
        ),
        strict=True,
    )
)
_QUICK = Settings(batches=4, bootstrap=200, samples=16, fit_steps=60, quick=True)
_AT_LEAST = {"batches": 1, "bootstrap": 20, "samples": 1, "fit_steps": 1, "seed": 0}


def run(args: argparse.Namespace) -> int:
    """Measure, draw, write; the last line of standard output is where the report is.

    Raises:
        ConfigError: settings that cannot work.
        CheckpointError, DataError: a checkpoint or data that cannot be read, or no routers in it.
    """
    device = set_up(args)
    settings = settings_of(args)
    checkpoint, out = args.checkpoint, args.out
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is no checkpoint directory")
    if out.resolve() == checkpoint.resolve():
        raise ConfigError("--out must not be the checkpoint, which stays as it is")
    lab = _lab(checkpoint, settings.seed, device)
    if not lab.routers:
        raise DataError("this model has no routers to report on: it has one expert per group")
    out.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    progress.say("opening the data")
    data = open_source(
        args.data,
        args.recipe,
        checkpoint,
        out,
        num_batches=settings.batches,
        seed=settings.seed,
    )
    study = Study(
        lab=lab,
        data=data,
        checkpoint=checkpoint,
        settings=settings,
        bootstrap=Bootstrap(settings.bootstrap, settings.seed),
        progress=progress,
        baseline=_baseline(args.baseline, data, settings.seed, device),
    )
    store, depends_on = Store(out), _dependencies(args, data, settings, device)
    parts: dict[str, Any] = {}
    for name in PARTS:
        found = store.load(name, depends_on[name])
        if found is None and name in args.parts:
            found = store.save(name, depends_on[name], _STUDIES[name](study))
            progress.end()
        if found is not None:
            parts[name] = found
    report = plain(
        {
            "format": FORMAT,
            "checkpoint": _about(checkpoint, data.config),
            "data": {"source": args.data, "summary": data.summary},
            "settings": asdict(settings),
            "machine": machine() | {"device": device.type},
            "findings": findings(parts),
            "parts": parts,
        }
    )
    write_atomically(out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    try:
        figures = draw_all(report, out)
    except ConfigError as error:
        print(f"no plots: {error}", file=sys.stderr)
        figures = {}
    write_page(report, figures, out / "report.html")
    for finding in report["findings"]:
        print(f"{finding['question']} {finding['answer']}")
    print(f"report written to {out / 'report.html'}")
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises ConfigError for numbers that are too small."""
    given = {name: getattr(args, name) for name in _AT_LEAST if getattr(args, name) is not None}
    for name, value in given.items():
        if value < _AT_LEAST[name]:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} must be at least {_AT_LEAST[name]}, got {value}")
    return replace(_QUICK if args.quick else Settings(), **given)


def _lab(checkpoint: Path, seed: int, device: torch.device) -> Lab:
    config = ModelConfig.load(checkpoint)
    return Lab(load_model(checkpoint, config, dtype=torch.float32, device=device), seed)


def _baseline(
    checkpoint: Path | None, data: LabData, seed: int, device: torch.device
) -> Lab | None:
    if checkpoint is None:
        return None
    found = _lab(checkpoint, seed, device)
    theirs = found.model.config
    if (theirs.vocab_size, theirs.image) != (data.config.vocab_size, data.config.image):
        raise ConfigError(f"--baseline {checkpoint} has other tokens than the checkpoint")
    return found


def _dependencies(
    args: argparse.Namespace, data: LabData, settings: Settings, device: torch.device
) -> dict[str, dict[str, Any]]:
    """What each part is a function of; threads are left out, they only move last digits.

    A device moves decisions too, so parts of two are not mixed; the CPU goes without saying, as in
    reports that were begun when there was no other.
    """
    common = {
        "checkpoint": _fingerprint(args.checkpoint),
        "data": data.fingerprint(),
        **{name: getattr(settings, name) for name in ("batches", "bootstrap", "seed", "quick")},
    }
    if device.type != "cpu":
        common["device"] = device.type
    baseline = None if args.baseline is None else _fingerprint(args.baseline)
    own: dict[str, dict[str, Any]] = {
        "noise": {"baseline": baseline},
        "generation": {"samples": settings.samples},
        "better-routers": {"fit_steps": settings.fit_steps},
    }
    return {name: {"part": name, **common, **own.get(name, {})} for name in PARTS}


def _fingerprint(checkpoint: Path) -> str:
    """Hash of all that generation and losses depend on."""
    files = [checkpoint / "config.json", *weight_files(checkpoint)]
    optional = ("tokenizer.json", "generation_config.json", "chat_template.jinja")
    files += [checkpoint / name for name in optional]
    files += sorted((checkpoint / "image_tokenizer").glob("*"))
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            digest.update(path.name.encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _about(checkpoint: Path, config: ModelConfig) -> dict[str, Any]:
    return {
        "name": checkpoint.resolve().name,
        "sha256": _fingerprint(checkpoint),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "groups": {group.name: group.num_experts for group in config.expert_groups},
        "depth_routing": None
        if config.depth_routing is None
        else {
            "layers": list(config.depth_routing.layers),
            "capacity": list(config.depth_routing.capacity),
        },
    }
