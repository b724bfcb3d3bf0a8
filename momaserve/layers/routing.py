"""Routers: from hidden states to selections, by the policies of model.md, section 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momaserve.config import RoutingPolicy
from momaserve.kernels import reference
from momaserve.layers.batch import POLICY_CODES, RoutingPlan


class AuxiliaryRouter(nn.Module):
    """Two-layer router that selects without looking at other tokens. Float32 throughout."""

    def __init__(self, hidden_size: int, aux_hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, aux_hidden_size, bias=False, dtype=torch.float32)
        self.fc2 = nn.Linear(aux_hidden_size, num_outputs, bias=False, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> logits [T, E]."""
        return reference.router_hidden(x, self.fc1.weight, self.fc2.weight)


class Router(nn.Module):
    """Main router (scores and weights), auxiliary router and thresholds of one selection.

    `aux` and `threshold_logits` are None where the checkpoint has none; asking for a policy
    that needs them is prevented when a request arrives, so it is a bug here. `capacity` is the
    share of tokens that one output takes under expert choice; None is 1 / num_outputs.
    """

    threshold_logits: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        aux_hidden_size: int,
        num_outputs: int,
        capacity: float | None = None,
    ) -> None:
        super().__init__()
        self.capacity = capacity
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden_size, dtype=torch.float32))
        self.aux: AuxiliaryRouter | None = AuxiliaryRouter(
            hidden_size, aux_hidden_size, num_outputs
        )
        self.register_buffer("threshold_logits", torch.zeros(num_outputs, dtype=torch.float32))

    def scores(self, x: Tensor) -> Tensor:
        """x [T, D] -> main logits, float32 [T, E]; their sigmoid is the affinity."""
        if torch.is_autocast_enabled(x.device.type):  # mixed-precision training, never serving
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x.float(), self.weight.float())
        return F.linear(x.float(), self.weight.float())

    def select(self, x: Tensor, logits: Tensor, eligible: Tensor, plan: RoutingPlan) -> Tensor:
        """Selections of each token under its own policy: bool [T, E].

        Args:
            x: [T, D] what the routers read.
            logits: [T, E] from `scores`.
            eligible: bool [T], tokens that this router may select at all.
        """
        selections: list[tuple[RoutingPolicy, Tensor]] = []
        for policy in sorted(plan.policies):
            if policy is RoutingPolicy.CAUSAL:
                assert self.aux is not None, "causal routing without auxiliary router"
                selections.append((policy, self.aux(x) > 0))
            elif policy is RoutingPolicy.CALIBRATED:
                assert self.threshold_logits is not None, "calibrated routing without thresholds"
                selections.append((policy, logits > self.threshold_logits))
            elif policy is RoutingPolicy.THRESHOLD:
                selections.append((policy, logits > 0))
            else:
                chosen = reference.expert_choice(
                    logits, eligible, plan.segments, plan.num_segments, self.capacity
                )
                selections.append((policy, chosen))
        selected = selections[0][1]
        for policy, chosen in selections[1:]:
            mine = (plan.policy == POLICY_CODES[policy]).unsqueeze(1)
            selected = torch.where(mine, chosen, selected)
        return selected & eligible.unsqueeze(1)
