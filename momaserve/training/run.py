"""What every training run shares: its directory, exact resume, log, schedule and progress.

Nothing random is stored: the data and the noise of step i are a pure function of (seed, i), so
a run resumed from the state of step i goes on exactly as the undisturbed one. States are
safetensors files written under a temporary name and renamed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from momaserve.errors import DataError


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain, temporary, metadata=metadata)
    temporary.chmod(0o644)  # safetensors makes private files; a server may run as another user
    os.replace(temporary, path)


def trapezoid(step: int, num_steps: int, *, warmup: int, decay_from: float, floor: float) -> float:
    """Learning-rate factor: linear warm-up, constant, linear to `floor` from `decay_from` on.

    Args:
        step: steps done so far, from 0.
        decay_from: share of `num_steps` after which the decay begins, in [0, 1].
    """
    if step < warmup:
        return (step + 1) / warmup
    start = decay_from * num_steps
    if step < start:
        return 1.0
    left = (num_steps - step) / max(1.0, num_steps - start)
    return floor + (1 - floor) * left


def cosine(step: int, num_steps: int, *, warmup: int, floor: float) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


class Run:
    """One training run in its directory: `state.safetensors`, `log.jsonl`, `run.json`.

    Owns the step counter. A directory that holds a state of the same configuration is resumed;
    one of another configuration is refused.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], *, num_steps: int) -> None:
        """Raises DataError when `directory` belongs to a run with another configuration."""
        self.directory = directory
        self.num_steps = num_steps
        self.step = 0
        directory.mkdir(parents=True, exist_ok=True)
        config_path = directory / "run.json"
        text = json.dumps(config, indent=2) + "\n"
        if config_path.exists() and config_path.read_text(encoding="utf-8") != text:
            raise DataError(
                f"{directory} holds a run with another configuration (run.json differs); "
                "choose another --out or remove it"
            )
        write_atomically(config_path, text)
        self._started = time.monotonic()

    @property
    def state_path(self) -> Path:
        return self.directory / "state.safetensors"

    def resume(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Load the last state, if there is one, into modules and optimizer."""
        if not self.state_path.exists():
            return
        try:
            tensors = load_file(self.state_path)
        except SafetensorError as error:
            raise DataError(f"{self.state_path} cannot be read: {error}") from error
        self.step = int(tensors.pop("step").item())
        for name, module in modules.items():
            prefix = f"{name}."
            module.load_state_dict(
                {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
            )
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, field = key.split(".")
                moments.setdefault(int(index), {})[field] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
        print(f"resuming {self.directory} at step {self.step}", file=sys.stderr)

    def save(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Store everything that the steps done so far have made; call it after a step's work."""
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step + 1)}
        for name, module in modules.items():
            tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
        for index, fields in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in fields.items()}
        save_tensors(tensors, self.state_path, {})

    def steps(self) -> Iterator[int]:
        """Yield the number of each step still to do, with a progress bar on a terminal."""
        bar = tqdm(
            total=self.num_steps, initial=self.step, unit="step", disable=not sys.stderr.isatty()
        )
        with bar:
            while self.step < self.num_steps:
                yield self.step
                self.step += 1
                bar.update()

    def log(self, values: Mapping[str, float]) -> None:
        """Append one line to log.jsonl and show it."""
        record: dict[str, float] = {
            "step": self.step + 1,
            "elapsed_s": round(time.monotonic() - self._started, 1),
        }
        record |= {k: round(v, 6) for k, v in values.items()}
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        line = "  ".join(f"{k} {v:g}" for k, v in record.items())
        tqdm.write(line, file=sys.stderr)


def logged_seconds(directory: Path) -> float:
    """Time that a run took, over all the processes that it was resumed in, by its log."""
    path = directory / "log.jsonl"
    if not path.exists():
        return 0.0  # fewer steps than the first line of a log takes
    total = last = 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        elapsed = float(json.loads(line)["elapsed_s"])
        total += elapsed - last if elapsed >= last else elapsed
        last = elapsed
    return total
