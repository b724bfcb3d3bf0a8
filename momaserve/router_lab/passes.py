"""One model over packed rows, teacher-forced, under any policy: losses and selections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.layers.batch import POLICY_CODES, ForwardBatch, RoutingPlan
from momaserve.layers.routing import Router
from momaserve.models.moma import MomaModel
from momaserve.router_lab.losses import document_losses, documents_of_tokens
from momaserve.router_lab.policies import Policy, Rule
from momaserve.router_lab.selections import Recorder, Seen
from momaserve.router_lab.statistics import Sums
from momaserve.training.fit_routers import named_routers
from momaserve.training.forward import forward_batch
from momaserve.training.packing import PackedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one batch gave under one policy."""

    losses: Sums
    """[D, 4], see `document_losses`."""
    sites: Mapping[str, Seen]
    changed: Mapping[str, tuple[int, int]]
    """Of policies with edits, see `Rule`."""


class Lab:
    """Runs batches through one model; results are pure functions of rows, policy and seed."""

    def __init__(self, model: MomaModel, seed: int = 0) -> None:
        self.model = model
        self.seed = seed

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.device

    @property
    def routers(self) -> dict[str, Router]:
        return named_routers(self.model)

    def missing_for(self, policy: Policy) -> str | None:
        """Why the model cannot be routed so, or None when it can."""
        return self.model.missing_for(policy.base)

    @torch.inference_mode()
    def run(
        self, rows: PackedRows, policy: Policy, number: int, *, with_scores: bool = False
    ) -> Pass:
        """
        Args:
            number: of the batch, which seeds what is random in the policy.
            with_scores: also record the auxiliary routers' logits.
        """
        rows, routers = rows.to(self.device), self.routers
        recorder = Recorder(rows, routers if with_scores else None)
        batch: ForwardBatch = forward_batch(self.model.config, rows, policy.base, recorder)
        plan = prompt_scoped(batch.routing, rows) if policy.is_prompt_scoped else batch.routing
        rule = None
        if policy.edits:
            real = ~rows.is_padding.flatten()
            rule = Rule(policy.edits, routers, real, f"{self.seed}/{number}")
            plan = replace(plan, rule=rule)
        losses = document_losses(self.model, rows, replace(batch, routing=plan))
        changed = {} if rule is None else rule.changed
        return Pass(losses=losses, sites=recorder.sites, changed=changed)


def prompt_scoped(plan: RoutingPlan, rows: PackedRows) -> RoutingPlan:
    """Expert choice over the prompt of each document, causal after it."""
    inside = prompt_tokens(rows)
    documents = documents_of_tokens(rows)
    codes = torch.where(
        inside,
        POLICY_CODES[RoutingPolicy.EXPERT_CHOICE],
        POLICY_CODES[RoutingPolicy.CAUSAL],
    )
    return replace(
        plan,
        policies=frozenset({RoutingPolicy.EXPERT_CHOICE, RoutingPolicy.CAUSAL}),
        policy=codes.to(plan.policy.dtype),
        segments=torch.where(inside, documents, -1),
        num_segments=max(0, int(documents.max()) + 1),
    )


def prompt_tokens(rows: PackedRows) -> Tensor:
    """bool [R * S]: tokens that a request would bring rather than get.

    All before the last stretch of learnt tokens of each document; of one that is learnt as a
    whole (after its first token), the first half.
    """
    documents = documents_of_tokens(rows).cpu()
    learnt = torch.zeros_like(rows.targets, dtype=torch.bool)
    learnt[:, 1:] = rows.targets[:, :-1] >= 0
    marks = learnt.flatten().cpu()
    inside = torch.zeros_like(marks)
    for number in range(max(0, int(documents.max()) + 1)):
        places = (documents == number).nonzero().squeeze(1)
        mine = marks[places]
        not_learnt = (~mine).nonzero().squeeze(1)
        last = int(not_learnt[-1]) if len(not_learnt) else 0
        if last == len(places) - 1:  # a document cut off within a question, or with no answer
            length = len(places)
        elif last == 0:
            length = (len(places) + 1) // 2
        else:
            length = last + 1
        inside[places[:length]] = True
    return inside.to(rows.token_ids.device)
