"""Fits what causal serving needs, with the main model frozen: auxiliary routers and thresholds.

Each auxiliary router learns, by binary cross-entropy, the selection that batch-level expert
choice makes from the same hidden state (MoMa, 2407.21770, section 2.4). The threshold of an
expert is the running mean of its k-th best score over the same batches; or, where a recipe asks
for it, what selects its share of the tokens when all thresholds are in use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    joint_rounds: int = 0
    """Rounds of `joint_thresholds`, over the batches that follow the last step; 0 keeps the running
    means."""
    joint_batches: int = 16

    def __post_init__(self) -> None:
        """Raises ConfigError for an unknown loss, and for rounds or batches that cannot be."""
        if self.loss not in LOSSES:
            raise ConfigError(f"loss must be one of {LOSSES}, got {self.loss!r}")
        for name, minimum in (("joint_rounds", 0), ("joint_batches", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < minimum:
                raise ConfigError(f"{name} must be an integer >= {minimum}, got {value!r}")


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


def record_selections(
    model: MomaModel, rows: PackedRows, policy: RoutingPolicy = RoutingPolicy.EXPERT_CHOICE
) -> list[Selections]:
    """Selections over packed rows, of batch-level expert choice as a rule, without gradients."""
    recorder = SelectionRecorder(rows)
    with torch.no_grad():
        model(forward_batch(model.config, rows, policy, recorder))
    return recorder.selections


def capacity_cut(logits: Tensor, router: Router, factor: float = 1.0) -> Tensor:
    """The logits [E] above which each expert finds `factor` times its capacity of N tokens.

    Args:
        logits: [N, E].
    """
    capacity = router.capacity or 1 / logits.shape[1]
    share = min(1.0, factor * capacity)
    return logits.double().quantile(1 - share, dim=0).float()


def pooled_thresholds(
    model: MomaModel, batches: Sequence[PackedRows], policy: RoutingPolicy
) -> dict[str, Tensor]:
    """Threshold logits [E] that select each router's capacity of all tokens it meets under a
    policy; a router that meets none is left out."""
    found: dict[str, list[Tensor]] = {}
    for rows in batches:
        for entry in record_selections(model, rows, policy):
            found.setdefault(entry.name, []).append(entry.logits)
    routers = named_routers(model)
    return {name: capacity_cut(torch.cat(each), routers[name]) for name, each in found.items()}


def joint_thresholds(
    model: MomaModel, batches: Sequence[PackedRows], num_rounds: int
) -> dict[str, Tensor]:
    """Threshold logits that select the capacity of those tokens which they themselves bring about.

    Under other thresholds the layers below hand on other hidden states. Each round puts the last
    one's thresholds into use and takes those that would have been right; the first takes them from
    expert choice. The model keeps the thresholds it has.
    """
    routers = named_routers(model)
    kept = {name: router.threshold_logits for name, router in routers.items()}
    found = pooled_thresholds(model, batches, RoutingPolicy.EXPERT_CHOICE)
    try:
        for _ in range(num_rounds):
            for name, router in routers.items():
                # A router that met no token has nothing to select.
                none = torch.full_like(router.weight[:, 0], float("inf"))
                router.threshold_logits = found.get(name, none)
            found |= pooled_thresholds(model, batches, RoutingPolicy.CALIBRATED)
    finally:
        for name, router in routers.items():
            router.threshold_logits = kept[name]
    return found


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
    joint: dict[str, Tensor] = {}
    if training.joint_rounds:
        steps = range(training.num_steps, training.num_steps + training.joint_batches)
        batches = [rows_of_step(step).to(device) for step in steps]
        joint = joint_thresholds(model, batches, training.joint_rounds)
    for name, router in routers.items():
        values = thresholds.get_buffer(name.replace(".", "_"))
        router.threshold_logits = joint.get(name, values.double().logit().float())
    save_model(model, out, torch.bfloat16)
    return model
