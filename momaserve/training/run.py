"""What every training run shares: its directory, exact resume, log, schedule and progress.

Nothing random is stored: the data and the noise of step i are a pure function of (seed, i), so
a run resumed from the state of step i goes on exactly as the undisturbed one. States are
safetensors files written under a temporary name and renamed, so that a run killed at any moment
leaves the last whole one.
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
from momaserve.models.config import read_json_object


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


def filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with what `defaults` has beside it, in nested objects too."""
    result = {**defaults, **values}
    for name, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(result[name], Mapping):
            result[name] = filled(result[name], default)
    return result


class Run:
    """One training run in its directory: `state.safetensors`, `log.jsonl`, `run.json`.

    Owns the step counter. A directory that holds a state of the same configuration is resumed;
    one of another configuration is refused.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        *,
        num_steps: int,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens a directory, new or not.

        Args:
            defaults: what a setting was before it could be set: runs begun by an older version,
                whose run.json lacks it, go on.

        Raises:
            DataError: `directory` belongs to a run with another configuration.
        """
        self.directory = directory
        self.num_steps = num_steps
        self.step = 0
        self.counters: dict[str, float] = {}
        """Sums over all steps, stored with the state; absent until somebody counts."""
        directory.mkdir(parents=True, exist_ok=True)
        config_path = directory / "run.json"
        text = json.dumps(config, indent=2) + "\n"
        if config_path.exists():
            stored = filled(read_json_object(config_path), defaults or {})
            if stored != json.loads(text):
                raise DataError(
                    f"{directory} holds a run with another configuration (run.json differs); "
                    "choose another --out or remove it"
                )
        write_atomically(config_path, text)
        self._bar: tqdm[Any] | None = None
        self._shown: dict[str, float] = {}
        self._started = time.monotonic()

    @property
    def state_path(self) -> Path:
        return self.directory / "state.safetensors"

    def resume(self, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Load the last state, if there is one, into modules and optimizer."""
        _drop_half_line(self.directory / "log.jsonl")
        if not self.state_path.exists():
            return
        try:
            tensors = load_file(self.state_path)
        except SafetensorError as error:
            raise DataError(f"{self.state_path} cannot be read: {error}") from error
        self.step = int(tensors.pop("step").item())
        self.counters = {
            name.removeprefix("counter."): float(value)
            for name, value in tensors.items()
            if name.startswith("counter.")
        }
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
        for name, value in self.counters.items():
            tensors[f"counter.{name}"] = torch.tensor(value, dtype=torch.float64)
        for name, module in modules.items():
            tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
        for index, fields in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in fields.items()}
        save_tensors(tensors, self.state_path, {})

    @property
    def is_finished(self) -> bool:
        return self.step >= self.num_steps

    def steps(self) -> Iterator[int]:
        """Yield the number of each step still to do, with a progress bar on a terminal."""
        bar: tqdm[Any] = tqdm(
            total=self.num_steps,
            initial=self.step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._bar = bar
        with bar:
            while not self.is_finished:
                yield self.step
                self.step += 1
                bar.update()

    def log(self, values: Mapping[str, float]) -> None:
        """Append one line to log.jsonl; show it in the bar, or as a line where there is none."""
        record: dict[str, float] = {
            "step": self.step + 1,
            "elapsed_s": round(time.monotonic() - self._started, 1),
        }
        record |= {k: round(v, 6) for k, v in values.items()}
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._bar is None or self._bar.disable:
            print("  ".join(f"{k} {v:g}" for k, v in record.items()), file=sys.stderr, flush=True)
            return
        self._shown |= values
        self._bar.set_postfix_str(" ".join(f"{k}={v:.3g}" for k, v in self._shown.items()))


def _drop_half_line(path: Path) -> None:
    """Cut a log behind its last whole line: a process may have been killed within one."""
    if not path.exists():
        return
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        write_atomically(path, text[: text.rfind(b"\n") + 1].decode("utf-8"))


def read_log(directory: Path) -> list[dict[str, float]]:
    """The records of a run by rising step.

    Steps done again after a resume are in the log twice: the later ones count.
    """
    path = directory / "log.jsonl"
    if not path.exists():
        return []  # fewer steps than the first line of a log takes
    records: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # its writer is at work, or was killed
        record = json.loads(line)
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        if records and records[-1]["step"] == record["step"]:
            records[-1] |= record
        else:
            records.append(record)
    return records


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
