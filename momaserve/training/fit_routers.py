"""Fits what causal serving needs, with the main model frozen: auxiliary routers and thresholds.

Each auxiliary router learns, by binary cross-entropy, the selection that batch-level expert
choice makes from the same hidden state (MoMa, 2407.21770, section 2.4). The threshold of an
expert is the running mean of its k-th best score over the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momaserve.config import RoutingPolicy
from momaserve.errors import ConfigError, DataError
from momaserve.layers.block import Block
from momaserve.layers.experts import ExpertGroup, ExpertLayer
from momaserve.layers.routing import AuxiliaryRouter, Router
from momaserve.models.config import ModelConfig
from momaserve.models.moma import MomaModel
from momaserve.training.forward import forward_batch
from momaserve.training.packing import PackedRows, RowsOfStep
from momaserve.training.pretrain import save_model
from momaserve.training.run import Run, cosine

LOSSES = ("bce", "weighted_bce", "distillation")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRoutersConfig:
    """Configuration of a run."""

    num_steps: int = 1500
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    threshold_decay: float = 0.99
    seed: int = 1
    log_every: int = 50
    save_every: int = 500
    loss: str = "bce"
    """One of LOSSES, see `router_loss`."""

    def __post_init__(self) -> None:
        """Raises ConfigError for an unknown loss."""
        if self.loss not in LOSSES:
            raise ConfigError(f"loss must be one of {LOSSES}, got {self.loss!r}")


@dataclass(slots=True)
class Selections:
    """One router's inputs and expert-choice selections in one forward."""

    name: str
    """Layer and group, as `3.image`, or `3.depth`."""
    inputs: Tensor
    """[T, D], only tokens that the router may select."""
    logits: Tensor
    """[T, E] main logits."""
    selected: Tensor
    """bool [T, E]."""


class SelectionRecorder:
    """Observer that keeps every selection of a forward pass, padding left out.

    A router without tokens in the batch has no entry.
    """

    def __init__(self, rows: PackedRows) -> None:
        self._real = ~rows.is_padding.flatten()
        self.selections: list[Selections] = []

    def experts(
        self, layer: int, group: str, u: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        self._keep(f"{layer}.{group}", u, logits, eligible, selected)

    def depth(self, layer: int, x: Tensor, logits: Tensor, eligible: Tensor, taken: Tensor) -> None:
        self._keep(f"{layer}.depth", x, logits.unsqueeze(1), eligible, taken.unsqueeze(1))

    def _keep(
        self, name: str, inputs: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        rows = (eligible & self._real).nonzero().squeeze(1)
        if not len(rows):
            return  # a batch without pictures says nothing about the routers of pictures
        self.selections.append(Selections(name, inputs[rows], logits[rows], selected[rows]))


def named_routers(model: MomaModel) -> dict[str, Router]:
    """Every router under the name that `SelectionRecorder` gives its selections."""
    routers: dict[str, Router] = {}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        assert isinstance(block.experts, ExpertLayer)
        if block.depth_router is not None:
            routers[f"{layer}.depth"] = block.depth_router.router
        for group in block.experts.groups:
            assert isinstance(group, ExpertGroup)
            if group.router is not None:
                routers[f"{layer}.{group.name}"] = group.router
    return routers


def routed_groups(model: MomaModel) -> dict[str, ExpertGroup]:
    """Every expert group that has a router, under its router's name."""
    groups: dict[str, ExpertGroup] = {}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        assert isinstance(block.experts, ExpertLayer)
        for group in block.experts.groups:
            assert isinstance(group, ExpertGroup)
            if group.router is not None:
                groups[f"{layer}.{group.name}"] = group
    return groups


def new_auxiliary_routers(
    model: MomaModel, seed: int, width: int | None = None
) -> dict[str, AuxiliaryRouter]:
    """A fresh auxiliary router for every router of the model, which stays as it is.

    Args:
        width: hidden units of each; None is what the model's configuration says.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    widths = {group.name: group.aux_hidden_size for group in config.expert_groups}
    if config.depth_routing is not None:
        widths["depth"] = config.depth_routing.aux_hidden_size
    fresh: dict[str, AuxiliaryRouter] = {}
    for name, router in named_routers(model).items():
        hidden = widths[name.partition(".")[2]] if width is None else width
        outputs = router.weight.shape[0]
        fresh[name] = AuxiliaryRouter(config.hidden_size, hidden, outputs)
        with torch.no_grad():
            for linear in (fresh[name].fc1, fresh[name].fc2):
                std = linear.weight.shape[1] ** -0.5
                linear.weight.normal_(0.0, std, generator=generator)
    return fresh


def as_module(auxiliary: Mapping[str, AuxiliaryRouter]) -> nn.ModuleDict:
    """Routers as one module, whose parameters are trained together; its keys have no dots."""
    return nn.ModuleDict({name.replace(".", "_"): each for name, each in auxiliary.items()})


class Thresholds(nn.Module):
    """Running means of each expert's k-th best score: what a state file must keep."""

    def __init__(self, routers: dict[str, Router]) -> None:
        super().__init__()
        for name, router in routers.items():
            self.register_buffer(name.replace(".", "_"), torch.zeros(router.weight.shape[0]))
            self.register_buffer(self._counter(name), torch.zeros((), dtype=torch.int64))

    @staticmethod
    def _counter(name: str) -> str:
        """Buffer of a router's updates, which are as many as the batches that it had tokens in."""
        return name.replace(".", "_") + "_updates"

    @torch.no_grad()
    def update(self, selections: list[Selections], decay: float) -> None:
        for entry in selections:
            count = self.get_buffer(self._counter(entry.name)).add_(1)
            # A true mean at first, then an exponential one.
            weight = max(1 - decay, 1 / int(count))
            # The k-th best score is the lowest one selected.
            lowest = entry.logits.masked_fill(~entry.selected, float("inf")).amin(0).sigmoid()
            self.get_buffer(entry.name.replace(".", "_")).lerp_(lowest, weight)


def router_loss(logits: Tensor, entry: Selections, loss: str, group: ExpertGroup | None) -> Tensor:
    """How wrong an auxiliary router is about one router's selections: a scalar.

    "bce" is the mean binary cross-entropy; "weighted_bce" weighs each decision by the main
    router's affinity, since that is what an expert's output is multiplied by; "distillation" is
    the squared error of the group's output if experts were selected in part, by the router's
    probabilities, relative to that output's square (depth routers, which have no group: "bce").

    Args:
        logits: [T, E] of the auxiliary router.
        group: whose experts the router selects; None for a depth router.
    """
    wanted = entry.selected.float()
    if loss == "distillation" and group is not None:
        products = _output_products(entry, group)
        wrong = logits.sigmoid() - wanted
        error = torch.einsum("te,tef,tf->t", wrong, products, wrong).mean()
        power = torch.einsum("te,tef,tf->t", wanted, products, wanted).mean()
        return error / power.clamp_min(1e-12)
    weight = None
    if loss == "weighted_bce":
        affinity = entry.logits.sigmoid()
        weight = affinity / affinity.mean()
    return F.binary_cross_entropy_with_logits(logits, wanted, weight)


@torch.no_grad()
def _output_products(entry: Selections, group: ExpertGroup) -> Tensor:
    """[T, E, E]: inner products of what the experts would add to each token, weights included."""
    x, gate, up, down = entry.inputs, group.gate_proj, group.up_proj, group.down_proj
    hidden = F.silu(x @ gate.transpose(1, 2)) * (x @ up.transpose(1, 2))  # [E, T, F]
    outputs = (hidden @ down.transpose(1, 2)).float().transpose(0, 1)  # [T, E, D]
    outputs = outputs * entry.logits.sigmoid().unsqueeze(2)
    return outputs @ outputs.transpose(1, 2)


def auxiliary_loss(
    auxiliary: Mapping[str, AuxiliaryRouter],
    selections: list[Selections],
    loss: str = "bce",
    groups: Mapping[str, ExpertGroup] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Sum of `router_loss` over routers, and its mean by kind of router.

    Args:
        groups: as `routed_groups` gives them; needed for "distillation" alone.
    """
    total: Tensor = torch.zeros(())  # a scalar adds to tensors of any device
    sums: dict[str, list[float]] = {}
    for entry in selections:
        group = None if groups is None else groups.get(entry.name)
        value = router_loss(auxiliary[entry.name](entry.inputs), entry, loss, group)
        total = total + value
        sums.setdefault(entry.name.partition(".")[2], []).append(value.item())
    return total, {f"{kind}_{loss}": sum(v) / len(v) for kind, v in sums.items()}


def record_selections(model: MomaModel, rows: PackedRows) -> list[Selections]:
    """Selections of batch-level expert choice over packed rows, without gradients."""
    recorder = SelectionRecorder(rows)
    with torch.no_grad():
        model(forward_batch(model.config, rows, RoutingPolicy.EXPERT_CHOICE, recorder))
    return recorder.selections


def fit_routers(
    model: MomaModel, training: FitRoutersConfig, rows_of_step: RowsOfStep, out: Path
) -> MomaModel:
    """Fit auxiliary routers and thresholds; writes the whole checkpoint's weights to `out`.

    Raises:
        DataError: the model has no routers, or `out` holds a run with another configuration.
    """
    config: ModelConfig = model.config
    if not model.routers():
        raise DataError("this model has no routers to fit: it has one expert per group")
    run = Run(
        out / "run-routers",
        {"model": config.to_dict(), "training": asdict(training)},
        num_steps=training.num_steps,
        defaults={"training": asdict(FitRoutersConfig())},
    )
    device = model.embed_tokens.device
    model.requires_grad_(False)
    fresh = new_auxiliary_routers(model, training.seed)
    auxiliary = as_module(fresh).to(device)
    routers = named_routers(model)
    groups = routed_groups(model)
    for name, router in routers.items():
        router.aux = fresh[name]
    thresholds = Thresholds(routers).to(device)
    optimizer = torch.optim.AdamW(auxiliary.parameters(), lr=training.learning_rate)
    modules = {"auxiliary": auxiliary, "thresholds": thresholds}
    run.resume(modules, optimizer)
    for step in run.steps():
        factor = cosine(step, training.num_steps, warmup=training.warmup_steps, floor=0.02)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * factor
        selections = record_selections(model, rows_of_step(step).to(device))
        thresholds.update(selections, training.threshold_decay)
        loss, by_kind = auxiliary_loss(fresh, selections, training.loss, groups)
        if selections:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if (step + 1) % training.log_every == 0:
            run.log(by_kind | {"lr_factor": factor})
        if (step + 1) % training.save_every == 0 or step + 1 == training.num_steps:
            run.save(modules, optimizer)
    for name, router in routers.items():
        values = thresholds.get_buffer(name.replace(".", "_"))
        router.threshold_logits = values.double().logit().float()
    save_model(model, out, torch.bfloat16)
    return model
