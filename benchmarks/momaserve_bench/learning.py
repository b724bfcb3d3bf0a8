"""`momaserve bench learning`: which architecture learns most for the same FLOPs.

Every architecture learns the same rows in the same order for the same number of steps. Experts
are equally wide in all of them, and a group of E experts takes each token once on average, so
only the routers' FLOPs differ; they are counted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from momaserve.environment import machine
from momaserve.errors import ConfigError
from momaserve.models.config import ModelConfig
from momaserve.models.info import describe
from momaserve.training.commands.common import set_up
from momaserve.training.data import TrainingData, open_data
from momaserve.training.documents.settings import DocumentSettings
from momaserve.training.packing import PackedRows
from momaserve.training.plot import new_figure
from momaserve.training.pretrain import PretrainConfig, pretrain
from momaserve.training.recipe import Recipe
from momaserve.training.run import logged_seconds, read_log, write_atomically
from momaserve.training.upcycle import start_upcycled
from momaserve_bench.learning_curves import MODALITIES, curves_of, mean, smoothed, speed_up
from momaserve_bench.learning_options import LEARNERS
from momaserve_bench.learning_report import draw, print_report, write_page
from momaserve_bench.report import print_result

EXPERTS: dict[str, dict[str, int]] = {
    "dense": {"text+image": 1},
    "moe_8x": {"text+image": 8},
    "1t1i": {"text": 1, "image": 1},
    "4t4i": {"text": 4, "image": 4},
}
"""Experts of each group, by the modalities that it serves."""
SEED_SHARE = 0.25
"""Share of the steps after which `upcycled` goes from 1t1i to 4t4i."""
NUM_POINTS = 400
"""Points of a training curve at most, and a twentieth of them is averaged."""


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, then compare.

    Raises:
        ConfigError: settings that cannot work, or no matplotlib.
    """
    if args.steps < 4:
        raise ConfigError(f"--steps must be at least 4, got {args.steps}")
    if len(set(args.seeds)) != len(args.seeds):
        raise ConfigError(f"--seeds repeat: {args.seeds}")
    new_figure()  # better to hear now than after hours that nothing can be drawn
    device = set_up(args)
    recipe = sized(Recipe.load(args.recipe), args)
    chosen = [name for name in LEARNERS if name in args.architectures]
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        experiment = Experiment.open(recipe, args, seed, device)
        runs += [experiment.run(name) for name in chosen]
    result = {"runs": runs, "speed_up": speed_ups(runs)}
    paths = ("bench", "out", "data", "image_tokenizer", "page")
    settings = {name: value for name, value in vars(args).items() if name not in paths}
    settings |= {"recipe": Path(args.recipe).stem, "device": str(device)}
    report = {"settings": settings, "machine": machine(), **result}
    write_atomically(args.out / "learning.json", json.dumps(report) + "\n")
    draw(runs, args.out / "learning.png")
    if args.page is not None:
        write_page(args.page, report, args.out / "learning.png")
    print_report(report)
    short = [{k: v for k, v in each.items() if k != "curves"} for each in runs]
    print_result("learning", settings, {**result, "runs": short})
    return 0


def sized(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """The recipe with the sizes that the options give.

    Raises:
        ConfigError: a hidden size that is no multiple of the recipe's head_dim.
    """
    model, training = dict(recipe.model), recipe.pretrain
    if args.hidden_size is not None:
        heads, rest = divmod(args.hidden_size, model["head_dim"])
        if rest or not heads:
            raise ConfigError(
                f"--hidden-size must be a multiple of head_dim {model['head_dim']}, "
                f"got {args.hidden_size}"
            )
        model |= {"hidden_size": args.hidden_size, "num_attention_heads": heads}
        model["num_key_value_heads"] = heads
    if args.num_layers is not None:
        model["num_hidden_layers"] = args.num_layers
    if args.num_rows is not None:
        training = replace(training, num_rows=args.num_rows)
    data = recipe.data
    if isinstance(data, DocumentSettings):
        data = replace(data, num_rows=training.num_rows)
    return replace(recipe, model=model, pretrain=training, data=data)


def expert_groups(name: str, like: dict[str, Any]) -> list[dict[str, Any]]:
    """The `expert_groups` of an architecture, its experts as wide as those of group `like`."""
    return [
        {
            "name": served.replace("+", "_"),
            "modalities": served.split("+"),
            "num_experts": count,
            "intermediate_size": like["intermediate_size"],
        }
        for served, count in EXPERTS[name].items()
    ]


def speed_ups(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """eta over the dense run of the same seed: by architecture and modality, per seed and mean."""
    dense = {run["seed"]: run for run in runs if run["architecture"] == "dense"}
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run["seed"] not in dense:
            continue
        rows = found.setdefault(run["architecture"], {})
        for name in MODALITIES:
            theirs = dense[run["seed"]]["curves"]["train_smoothed"][name]
            eta = speed_up(theirs, run["curves"]["train_smoothed"][name])
            rows.setdefault(name, {"per_seed": []})["per_seed"].append(eta)
    for rows in found.values():
        for values in rows.values():
            values["mean"] = mean(values["per_seed"])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """All architectures under one seed, on the same data."""

    recipe: Recipe
    data: TrainingData
    validation: list[PackedRows]
    out: Path
    training: PretrainConfig
    device: torch.device

    @classmethod
    def open(
        cls, recipe: Recipe, args: argparse.Namespace, seed: int, device: torch.device
    ) -> Experiment:
        steps = args.steps
        training = replace(
            recipe.pretrain,
            seed=seed,
            num_steps=steps,
            warmup_steps=min(recipe.pretrain.warmup_steps, steps // 10),
            log_every=max(1, steps // NUM_POINTS),
            save_every=max(1, steps // 20),
            validate_every=max(1, steps // 20),
        )
        settings = recipe.data
        if isinstance(settings, DocumentSettings):
            settings = replace(settings, seed=seed)
        recipe = replace(recipe, pretrain=training, data=settings)
        data = open_data(recipe, args.data, args.image_tokenizer, args.out / f"data-seed{seed}")
        return cls(
            recipe=recipe,
            data=data,
            validation=data.validation_batches(),
            out=args.out,
            training=training,
            device=device,
        )

    def config(self, name: str) -> ModelConfig:
        like = self.recipe.model["expert_groups"][0]
        groups = {"expert_groups": expert_groups(name, like)}
        return ModelConfig.from_dict({**self.data.config.to_dict(), **groups})

    def run(self, name: str) -> dict[str, Any]:
        """Train an architecture, or what is left of it, and read its log."""
        if name != "upcycled":
            return self._result(name, [self._train(name, name, self.training)])
        whole = self.training.num_steps
        steps = round(SEED_SHARE * whole)
        # The seed's rate stays up: its schedule is the beginning of a long one.
        first = replace(self.training, num_steps=steps, decay_from=1.0)
        rest = replace(self.training, num_steps=whole - steps, router_noise="gumbel")
        seed = self._train("1t1i", "upcycled-from", first)
        return self._result(name, [seed, self._train("4t4i", name, rest, seed, steps)])

    def _train(
        self,
        architecture: str,
        label: str,
        training: PretrainConfig,
        seed_checkpoint: Path | None = None,
        skip_steps: int = 0,
    ) -> Path:
        """The checkpoint directory of a run that is finished."""
        out = self.out / f"{label}-seed{training.seed}"
        config = self.config(architecture)
        start = None
        if seed_checkpoint is not None:
            start = start_upcycled(seed_checkpoint, config, training.seed)
        pretrain(
            config,
            training,
            self.data.rows_of_step,
            out,
            validation=self.validation,
            start=start,
            skip_steps=skip_steps,
            fingerprint=self.data.fingerprint,
            device=self.device,
        )
        return out

    def _result(self, name: str, outs: list[Path]) -> dict[str, Any]:
        """What one or several runs, one going on with the other, come to."""
        train: dict[str, list[tuple[float, float]]] = {m: [] for m in MODALITIES}
        valid: dict[str, list[tuple[float, float]]] = {m: [] for m in MODALITIES}
        spent = seconds = 0.0
        for out in outs:
            records = read_log(out / "run")
            for modality in MODALITIES:
                train[modality] += curves_of(records, "", spent)[modality]
                valid[modality] += curves_of(records, "valid_", spent)[modality]
            spent += records[-1]["flops"]
            seconds += logged_seconds(out / "run")
        window = max(1, max(map(len, train.values())) // 20)
        smooth = {modality: smoothed(curve, window) for modality, curve in train.items()}
        return {
            "architecture": name,
            "seed": self.training.seed,
            "parameters": describe(ModelConfig.load(outs[-1])).num_parameters,
            "steps": self.training.num_steps,
            "flops": spent,
            "seconds": round(seconds, 1),
            "loss": {m: curve[-1][1] for m, curve in smooth.items() if curve},
            "validation_loss": {m: curve[-1][1] for m, curve in valid.items() if curve},
            "curves": {"train": train, "train_smoothed": smooth, "validation": valid},
        }
