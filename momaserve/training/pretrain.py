"""Pretraining with batch-level expert choice: next-token loss over text and picture tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from momaserve.errors import ConfigError
from momaserve.layers.attention import HeadNorm
from momaserve.layers.block import RMSNorm
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.weights import save_config, stored_tensors
from momaserve.training.expert_load import ExpertLoad
from momaserve.training.flops import step_flops
from momaserve.training.forward import LossSums, forward_batch, token_losses, validation_losses
from momaserve.training.packing import PackedRows, RowsOfStep
from momaserve.training.plot import plot_losses
from momaserve.training.router_noise import NOISES, noise_of_step
from momaserve.training.run import Run, save_tensors, trapezoid
from momaserve.training.start import Start, drop_serving_routers

BRANCH_SCALE = 0.3
PRECISIONS = ("float32", "bfloat16")
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """Configuration of a pretraining run.

    A field added later must default to what was done before it existed: `Run` then lets older
    runs go on.
    """

    num_steps: int = 10000
    num_rows: int = 6
    row_length: int = 256
    conversation_every: int = 6
    """Every so many steps the batch is one conversation as long as all rows together (source
    "dictionary" only; 0 is never)."""
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    decay_from: float = 0.4
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    text_loss_weight: float = 2.0
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    validate_every: int = 500
    """Steps between two losses on validation data, and one after the last; 0 is never."""
    router_noise: str | None = None
    """"none" or "gumbel" (see `router_noise`); left out, upcycling has it and training has not."""
    precision: str = "float32"
    """"bfloat16" computes under autocast; weights, optimizer and routers stay float32."""

    def __post_init__(self) -> None:
        """Raises ConfigError naming the field."""
        positive = ("num_steps", "num_rows", "row_length", "log_every", "save_every")
        not_negative = ("conversation_every", "warmup_steps", "seed", "validate_every")
        for minimum, names in ((1, positive), (0, not_negative)):
            for name in names:
                value = getattr(self, name)
                if type(value) is not int or value < minimum:
                    raise ConfigError(f"{name} must be an integer >= {minimum}, got {value!r}")
        if self.router_noise is not None and self.router_noise not in NOISES:
            raise ConfigError(f"router_noise must be one of {NOISES}, got {self.router_noise!r}")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")


def initialise(model: MomaModel, seed: int) -> None:
    """Random weights: normal with std 1/sqrt(fan-in); no auxiliary routers.

    Embeddings have unit scale and the norms of post-order branches a smaller one, so that a
    token's own identity is not drowned by what the first layers add.
    """
    drop_serving_routers(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, RMSNorm):
                is_branch = model.config.norm_order == "post" and module is not model.norm
                module.weight.fill_(BRANCH_SCALE if is_branch else 1.0)
            elif isinstance(module, HeadNorm):
                module.weight.fill_(1.0)
                module.bias.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm.bias")):
                continue
            std = parameter.shape[-1] ** -0.5
            if name == "embed_tokens" and model.lm_head is not None:
                std = 1.0
            elif name == "lm_head":
                std = 0.02
            parameter.normal_(0.0, std, generator=generator)


def pretrain(
    config: ModelConfig,
    training: PretrainConfig,
    rows_of_step: RowsOfStep,
    out: Path,
    *,
    validation: Sequence[PackedRows] = (),
    start: Start | None = None,
    skip_steps: int = 0,
    fingerprint: Mapping[str, str] | None = None,
    device: torch.device = CPU,
    plot: bool = False,
) -> MomaModel:
    """Train a model; writes config.json and model.safetensors (bf16) to `out`.

    Args:
        rows_of_step: the data, a pure function of the step's number.
        validation: held-out rows; none, and nothing is validated.
        start: weights to begin from; None is random ones.
        skip_steps: steps whose data is passed over, because `start` learnt it.
        fingerprint: hashes of the data, kept in run.json.
        plot: draw `run/loss.png` with every state.

    Raises:
        DataError: `out` holds a run with another configuration.
    """
    run = Run(
        out / "run",
        {
            "model": config.to_dict(),
            "training": asdict(training),
            "skip_steps": skip_steps,
            "origin": None if start is None else dict(start.origin),
            "data": None if fingerprint is None else dict(fingerprint),
        },
        num_steps=training.num_steps,
        defaults={
            "training": asdict(PretrainConfig()),
            "skip_steps": 0,
            "origin": None,
            "data": None,
        },
    )
    if start is None:
        model = MomaModel(config, torch.float32)
        initialise(model, training.seed)
    else:
        model = start.model.requires_grad_(True)
        drop_serving_routers(model)
    model.to(device)
    model.set_rope(config.max_position_embeddings)
    parameters = list(model.parameters())
    optimizer = _optimizer(parameters, training)
    run.resume({"model": model}, optimizer)
    meter = _Meter(run, config, training)
    for step in run.steps():
        factor = trapezoid(
            step,
            training.num_steps,
            warmup=training.warmup_steps,
            decay_from=training.decay_from,
            floor=0.02,
        )
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * factor
        rows = rows_of_step(step + skip_steps)
        meter.count_flops(rows)
        rows = rows.to(device)
        noise = noise_of_step(training.router_noise, training.seed, step)
        load = ExpertLoad(config, rows) if meter.is_due else None
        with _precision(training, device):
            batch = forward_batch(config, rows, observer=load, noise=noise)
            losses, is_image = token_losses(model, rows, batch)
        weights = torch.where(is_image, 1.0, training.text_loss_weight)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(parameters, training.clip_norm)
        optimizer.step()
        meter.add(losses, is_image, rows.num_tokens, float(norm))
        if load is not None:
            run.log(meter.report() | load.report() | {"lr_factor": factor})
        is_last = step + 1 == training.num_steps
        every = training.validate_every
        if validation and every and ((step + 1) % every == 0 or is_last):
            with _precision(training, device):
                found = validation_losses(model, [each.to(device) for each in validation])
            flops = {"flops": run.counters["flops"]}
            run.log({f"valid_{name}_nll": value for name, value in found.items()} | flops)
        if (step + 1) % training.save_every == 0 or is_last:
            # The state last: it says that everything up to it is written.
            save_model(model, out, torch.bfloat16)
            run.save({"model": model}, optimizer)
            if plot:
                plot_losses(run.directory)
    return model


def _optimizer(parameters: Sequence[nn.Parameter], training: PretrainConfig) -> torch.optim.AdamW:
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": training.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def _precision(training: PretrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    is_mixed = training.precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_mixed)


class _Meter:
    """Sums what the log shows between two of its lines, and the FLOPs of the whole run."""

    def __init__(self, run: Run, config: ModelConfig, training: PretrainConfig) -> None:
        self._run = run
        self._config = config
        self._training = training
        self._reset()

    def _reset(self) -> None:
        self._losses = LossSums()
        self._num_tokens = 0
        self._norms: list[float] = []
        self._since = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the step at work ends with a line in the log."""
        return (self._run.step + 1) % self._training.log_every == 0

    def count_flops(self, rows: PackedRows) -> None:
        """Call once per step. A state from before FLOPs were counted is put in at this step's."""
        flops = step_flops(self._config, rows)
        spent = self._run.counters.get("flops", float(flops) * self._run.step)
        self._run.counters["flops"] = spent + flops

    def add(self, losses: torch.Tensor, is_image: torch.Tensor, tokens: int, norm: float) -> None:
        self._losses.add(losses, is_image)
        self._num_tokens += tokens
        self._norms.append(norm)

    def report(self) -> dict[str, float]:
        """Means since the last report, which this one becomes."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        found = {f"{name}_nll": value for name, value in self._losses.means().items()} | {
            "tokens": float(self._num_tokens),
            "tokens_per_s": self._num_tokens / seconds,
            "grad_norm": sum(self._norms) / len(self._norms),
            "flops": self._run.counters["flops"],
        }
        self._reset()
        return found


def save_model(model: MomaModel, directory: Path, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors, weights in `dtype`."""
    save_config(model.config, directory)
    tensors = stored_tensors(model, dtype)
    save_tensors(tensors, directory / "model.safetensors", {"format": "pt"})
