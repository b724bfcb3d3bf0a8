"""Pretraining with batch-level expert choice: next-token loss over text and picture tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momaserve.config import RoutingPolicy
from momaserve.layers.attention import HeadNorm
from momaserve.layers.batch import POLICY_CODES, ForwardBatch, RoutingObserver, RoutingPlan
from momaserve.layers.block import RMSNorm
from momaserve.modality import Modality
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.models.weights import save_config, stored_tensors
from momaserve.training.packing import PackedAttention, PackedRows, Packer
from momaserve.training.run import Run, save_tensors, trapezoid
from momaserve.training.tasks import Exchange

BRANCH_SCALE = 0.3
Draw = Callable[[random.Random], Exchange]


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainConfig:
    """Configuration of a pretraining run."""

    num_steps: int = 10000
    num_rows: int = 6
    row_length: int = 256
    conversation_every: int = 6
    """Every so many steps the batch is one conversation as long as all rows together."""
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    decay_from: float = 0.4
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    text_loss_weight: float = 2.0
    seed: int = 0
    log_every: int = 50
    save_every: int = 500


def initialise(model: MomaModel, seed: int) -> None:
    """Random weights: normal with std 1/sqrt(fan-in); no auxiliary routers.

    Embeddings have unit scale and the norms of post-order branches a smaller one, so that a
    token's own identity is not drowned by what the first layers add.
    """
    for router in model.routers():
        router.aux = None  # fitted afterwards, on the frozen model
        router.threshold_logits = None
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


def forward_batch(
    config: ModelConfig,
    rows: PackedRows,
    policy: RoutingPolicy = RoutingPolicy.EXPERT_CHOICE,
    observer: RoutingObserver | None = None,
) -> ForwardBatch:
    """A batch of packed rows routed by one policy; the scope of expert choice is the batch."""
    token_ids = rows.token_ids.flatten()
    modality = torch.zeros_like(token_ids, dtype=torch.int8)
    if config.image is not None:
        image = config.image
        inside = (token_ids >= image.first_token_id) & (token_ids < image.stop_token_id)
        modality[inside] = int(Modality.IMAGE)
    segments = torch.where(rows.is_padding.flatten(), -1, 0)
    return ForwardBatch(
        token_ids=token_ids,
        positions=rows.positions.flatten(),
        modality=modality,
        modalities=frozenset(Modality),
        routing=RoutingPlan(
            policies=frozenset({policy}),
            policy=torch.full_like(modality, POLICY_CODES[policy]),
            segments=segments,
            num_segments=1,
        ),
        attention=PackedAttention(rows),
        observer=observer,
    )


def token_losses(model: MomaModel, rows: PackedRows, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
    """Losses in nat of the learnt tokens and whether each is an image token: two [M] tensors."""
    targets = rows.targets.flatten()
    learnt = (targets >= 0).nonzero().squeeze(1)
    hidden = model(batch)[learnt]
    wanted = targets[learnt]
    loss = F.cross_entropy(model.logits(hidden), wanted, reduction="none")
    image = model.config.image
    if image is None:
        return loss, torch.zeros_like(wanted, dtype=torch.bool)
    return loss, (wanted >= image.first_token_id) & (wanted < image.stop_token_id)


def rows_of_step(training: PretrainConfig, packer: Packer, draw: Draw, step: int) -> PackedRows:
    """The data of a step: a pure function of the seed and the step's number."""
    rng = random.Random(f"{training.seed}/{step}")
    if training.conversation_every and step % training.conversation_every == 0:
        length = training.num_rows * training.row_length
        return packer.conversation(lambda: draw(rng), length)
    return packer.documents(lambda: draw(rng), training.num_rows, training.row_length)


def pretrain(
    config: ModelConfig, training: PretrainConfig, packer: Packer, draw: Draw, out: Path
) -> MomaModel:
    """Train a model from scratch; writes config.json and model.safetensors (bf16) to `out`."""
    run = Run(
        out / "run",
        {"model": config.to_dict(), "training": asdict(training)},
        num_steps=training.num_steps,
    )
    model = MomaModel(config, torch.float32)
    initialise(model, training.seed)
    model.set_rope(config.max_position_embeddings)
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": training.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=training.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    run.resume({"model": model}, optimizer)
    sums = dict.fromkeys(("text", "image", "text_n", "image_n", "hits", "tokens"), 0.0)
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
        rows = rows_of_step(training, packer, draw, step)
        losses, is_image = token_losses(model, rows, forward_batch(config, rows))
        weights = torch.where(is_image, 1.0, training.text_loss_weight)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, training.clip_norm)
        optimizer.step()
        _count(sums, losses.detach(), is_image, rows.num_tokens)
        if (step + 1) % training.log_every == 0:
            run.log(_means(sums) | {"lr_factor": factor})
            sums = dict.fromkeys(sums, 0.0)
        if (step + 1) % training.save_every == 0 or step + 1 == training.num_steps:
            run.save({"model": model}, optimizer)
            save_model(model, out, torch.bfloat16)
    return model


def _count(sums: dict[str, float], losses: Tensor, is_image: Tensor, num_tokens: int) -> None:
    sums["text"] += float(losses[~is_image].sum())
    sums["image"] += float(losses[is_image].sum())
    sums["text_n"] += float((~is_image).sum())
    sums["image_n"] += float(is_image.sum())
    sums["tokens"] += num_tokens


def _means(sums: dict[str, float]) -> dict[str, float]:
    return {
        "text_nll": sums["text"] / max(1.0, sums["text_n"]),
        "image_nll": sums["image"] / max(1.0, sums["image_n"]),
        "tokens": sums["tokens"],
    }


def save_model(model: MomaModel, directory: Path, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors, weights in `dtype`."""
    save_config(model.config, directory)
    tensors = stored_tensors(model, dtype)
    save_tensors(tensors, directory / "model.safetensors", {"format": "pt"})
