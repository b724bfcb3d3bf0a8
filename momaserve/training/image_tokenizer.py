"""Trains the image tokenizer: pixels in, the same pixels out, through quantised codes.

Two stages, the second optional: everything together, then the decoder alone with the encoder
frozen, so that codes already used to train a language model stay valid.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from momaserve.errors import DataError
from momaserve.models.config import read_json_object
from momaserve.models.image_tokenizer import ImageAutoencoder, ImageTokenizerConfig
from momaserve.training.run import Run, cosine, save_tensors, write_atomically

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokenizerTraining:
    """Configuration of a run."""

    model: dict[str, Any] = field(default_factory=dict)
    """Fields of ImageTokenizerConfig; left out under `--init`, those of that one."""
    num_steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    ema_decay: float = 0.995
    idempotence: float = 0.0
    """Weight of the loss that makes a decoded picture encode to the codes it came from, so that
    drawn pictures can be read back."""
    seed: int = 0
    decoder_only: bool = False
    """Freeze the encoder and train the decoder alone, starting from `--init`."""
    save_every: int = 200
    log_every: int = 20


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> float [B, 3, S, S] in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels, on their differences along both axes, and on 4 x 4 means."""
    difference = output - target
    loss = difference.abs().mean()
    rows = difference.diff(dim=2).abs().mean()
    columns = difference.diff(dim=3).abs().mean()
    pooled = F.avg_pool2d(difference, 4).abs().mean()
    return loss + 0.25 * (rows + columns) + 0.5 * pooled


def idempotence_loss(model: ImageAutoencoder, output: Tensor, quantised: Tensor) -> Tensor:
    """How far decoded pictures are from encoding to the latents that they were decoded from.

    Nothing below a quarter of a level: such a latent is rounded to where it came from.
    """
    latents = model.latents(output.clamp(-1, 1))
    return (model.quantizer.distance(latents, quantised.detach()) - 0.25).relu().mean()


@torch.no_grad()
def codes_kept(model: ImageAutoencoder, pictures: Tensor, batch_size: int = 64) -> float:
    """Share of codes that are the same once decoded and encoded again; uint8 [B, S, S, 3]."""
    same: list[Tensor] = []
    device = next(model.parameters()).device
    for first in range(0, len(pictures), batch_size):
        codes = model.encode(to_pixels(pictures[first : first + batch_size].to(device)))
        same.append((model.encode(model.decode(codes)) == codes).float().mean(1))
    return float(torch.cat(same).mean())


@torch.no_grad()
def psnr(model: ImageAutoencoder, pictures: Tensor, batch_size: int = 64) -> float:
    """Mean peak signal-to-noise ratio in dB over pictures, uint8 [B, S, S, 3]."""
    values: list[Tensor] = []
    device = next(model.parameters()).device
    for first in range(0, len(pictures), batch_size):
        target = to_pixels(pictures[first : first + batch_size].to(device))
        output = model.decode(model.encode(target))
        error = ((output - target) / 2).pow(2).flatten(1).mean(1)
        values.append(-10 * error.clamp_min(1e-10).log10())
    return float(torch.cat(values).mean())


def train_image_tokenizer(
    training: ImageTokenizerTraining,
    train: np.ndarray[Any, Any],
    held_out: np.ndarray[Any, Any],
    out: Path,
    init: Path | None = None,
    *,
    device: torch.device = CPU,
) -> ImageAutoencoder:
    """Train on pictures, uint8 [B, S, S, 3]; writes config.json and model.safetensors to `out`.

    Raises:
        DataError: when `decoder_only` is set without `init`.
    """
    config = _config(training, init)
    run = Run(
        out / "run",
        asdict(training),
        num_steps=training.num_steps,
        defaults=asdict(ImageTokenizerTraining()),
    )
    torch.manual_seed(training.seed)
    model = ImageAutoencoder(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if init is not None:
        model.load_state_dict(load_file(init / "model.safetensors"))
    elif training.decoder_only:
        raise DataError("decoder_only needs --init, a trained image tokenizer to start from")
    average = ImageAutoencoder(config)
    average.load_state_dict(model.state_dict())
    model.to(device)
    average.to(device)
    model.encoder.requires_grad_(not training.decoder_only)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=1e-4)
    modules = {"model": model, "average": average}
    run.resume(modules, optimizer)
    pictures = torch.from_numpy(train)
    for step in run.steps():
        generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
        rows = torch.randint(len(pictures), (training.batch_size,), generator=generator)
        factor = cosine(step, training.num_steps, warmup=training.warmup_steps, floor=0.01)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * factor
        target = to_pixels(pictures[rows].to(device)).contiguous(memory_format=torch.channels_last)
        output, quantised = model(target)
        loss = reconstruction_loss(output, target)
        if training.idempotence:
            loss = loss + training.idempotence * idempotence_loss(model, output, quantised)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(training.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 1 - decay)
        if (step + 1) % training.log_every == 0:
            run.log({"loss": loss.item(), "grad_norm": float(norm), "lr_factor": factor})
        if (step + 1) % training.save_every == 0 or step + 1 == training.num_steps:
            some = slice(0, 128)
            others = torch.from_numpy(held_out)[some]
            run.log(
                {
                    "psnr_train_db": psnr(average, pictures[some]),
                    "psnr_held_out_db": psnr(average, others),
                    "codes_kept_held_out": codes_kept(average, others),
                }
            )
            # The state last: it says that everything up to it is written.
            save_image_tokenizer(average, out)
            run.save(modules, optimizer)
    return average


def _config(training: ImageTokenizerTraining, init: Path | None) -> ImageTokenizerConfig:
    """Raises DataError when `init` is of another shape than `training` says."""
    if init is None:
        return ImageTokenizerConfig.from_dict(training.model)
    theirs = ImageTokenizerConfig.from_dict(read_json_object(init / "config.json"))
    if training.model and theirs != ImageTokenizerConfig.from_dict(training.model):
        raise DataError(f"{init} is of another shape than the recipe's section says")
    return theirs


def save_image_tokenizer(model: ImageAutoencoder, directory: Path) -> None:
    """Write config.json and model.safetensors of an image tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "config.json", json.dumps(model.config.to_dict(), indent=2) + "\n")
    save_tensors(model.state_dict(), directory / "model.safetensors", {"format": "pt"})
