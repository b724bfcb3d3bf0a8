"""Routing of all expert groups of a layer at once, in plain torch: what the kernels must match.

Experts of all groups are numbered in configuration order. Which of them a token may have follows
from its modality by a table on the device, so that a step's mix of modalities is data and never
control flow. Letters: T rows, D hidden, A auxiliary hidden, E experts in all groups, S experts of
the largest group, R groups with a router, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.kernels import reference
from momaserve.modality import Modality

_POLICIES = list(RoutingPolicy)
CAUSAL = _POLICIES.index(RoutingPolicy.CAUSAL)
CALIBRATED = _POLICIES.index(RoutingPolicy.CALIBRATED)
EXPERT_CHOICE = _POLICIES.index(RoutingPolicy.EXPERT_CHOICE)
THRESHOLD = _POLICIES.index(RoutingPolicy.THRESHOLD)
"""Codes of the policies in int8 tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRouter:
    """Routers of one group of experts, as a checkpoint has them."""

    modalities: tuple[Modality, ...]
    num_experts: int
    main: Tensor | None
    """[E of the group, D]; None where every token of the modalities is taken, with weight 1."""
    fc1: Tensor | None = None
    """[A, D] of the auxiliary router, if there is one."""
    fc2: Tensor | None = None
    """[E of the group, A]."""
    thresholds: Tensor | None = None
    """[E of the group], logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterWeights:
    """Routers of all groups of a layer, stacked; contiguous, on one device."""

    main: Tensor
    """float32 [E, D]; zero for experts without router."""
    fc1: Tensor
    """[R, A, D] in any float format, since none loses by being widened; A = 0 without auxiliary
    routers, zero rows beyond a group's own A."""
    fc2: Tensor
    """float32 [E, A], zero beyond a group's own A."""
    thresholds: Tensor
    """float32 [E], logits; zero where there are none."""
    groups: Tensor
    """int32 [M, 3], by modality: first expert of its group, their number, the group's place in
    `fc1` or -1 where it has no router."""
    max_group: int
    """S."""

    @classmethod
    def stack(
        cls, groups: Sequence[GroupRouter], hidden_size: int, device: torch.device
    ) -> RouterWeights:
        """From groups in configuration order; `fc1` keeps its number format.

        Raises:
            ValueError: a modality that no group serves, or two; routers that do not fit together.
        """
        routed = [group for group in groups if group.main is not None]
        firsts = [group.fc1 for group in groups if group.fc1 is not None]
        if firsts and len(firsts) != len(routed):
            raise ValueError(
                f"{len(firsts)} of {len(routed)} groups with a router have an auxiliary one"
            )
        table: dict[Modality, tuple[int, int, int]] = {}
        num_experts = sum(group.num_experts for group in groups)
        inner = max((fc1.shape[0] for fc1 in firsts), default=0)
        main = torch.zeros(num_experts, hidden_size, device=device)
        thresholds = torch.zeros(num_experts, device=device)
        dtype = firsts[0].dtype if firsts else torch.float32
        fc1 = torch.zeros(len(routed), inner, hidden_size, dtype=dtype, device=device)
        fc2 = torch.zeros(num_experts, inner, device=device)
        first, router = 0, 0
        for group in groups:
            mine = slice(first, first + group.num_experts)
            for modality in group.modalities:
                if modality in table:
                    raise ValueError(f"two expert groups serve the modality {modality.label}")
                number = -1 if group.main is None else router
                table[modality] = (first, group.num_experts, number)
            if group.main is not None:
                main[mine] = group.main
                if group.thresholds is not None:
                    thresholds[mine] = group.thresholds
                if group.fc1 is not None and group.fc2 is not None:
                    fc1[router, : len(group.fc1)] = group.fc1
                    fc2[mine, : len(group.fc1)] = group.fc2
                router += 1
            first += group.num_experts
        missing = [modality.label for modality in Modality if modality not in table]
        if missing:
            raise ValueError(f"no expert group serves the modality {missing[0]}")
        rows = [table[modality] for modality in Modality]
        return cls(
            main=main,
            fc1=fc1,
            fc2=fc2,
            thresholds=thresholds,
            groups=torch.tensor(rows, dtype=torch.int32, device=device),
            max_group=max(group.num_experts for group in groups),
        )

    @property
    def num_experts(self) -> int:
        return self.main.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """(token, expert) pairs of a step, by expert and then by token, in buffers of fixed size.

    P = T * S is the most there can be. What stands beyond the last pair is arbitrary.
    """

    tokens: Tensor
    """int32 [P], the row of each pair."""
    weights: Tensor
    """float32 [P], its routing weight."""
    offsets: Tensor
    """int32 [E + 1]: pairs of expert e are offsets[e] to offsets[e + 1]."""
    places: Tensor
    """int32 [T, E]: number of the pair (token, expert), or -1 where it was not selected."""

    @classmethod
    def empty(cls, num_rows: int, num_experts: int, max_group: int, device: torch.device) -> Pairs:
        """Buffers for T rows, unset."""
        size = num_rows * max_group

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            tokens=integers(size),
            weights=torch.empty(size, dtype=torch.float32, device=device),
            offsets=integers(num_experts + 1),
            places=integers(num_rows, num_experts),
        )

    @classmethod
    def of(cls, selected: Tensor, weights: Tensor, max_group: int, out: Pairs | None) -> Pairs:
        """From selected bool [T, E] and weights float32 [T, E]. Waits for the device."""
        if out is None:
            out = cls.empty(len(selected), selected.shape[1], max_group, selected.device)
        experts, tokens = selected.t().nonzero(as_tuple=True)
        count = len(tokens)
        out.tokens[:count] = tokens.int()
        out.weights[:count] = weights[tokens, experts]
        counts = selected.sum(0)
        out.offsets[0] = 0
        out.offsets[1:] = counts.cumsum(0).int()
        out.places.fill_(-1)
        out.places[tokens, experts] = torch.arange(count, dtype=torch.int32, device=tokens.device)
        return out


def route(
    u: Tensor,
    modality: Tensor,
    policy: Tensor,
    routers: RouterWeights,
    *,
    taken: Tensor | None = None,
    chosen: Tensor | None = None,
    out: Pairs | None = None,
) -> Pairs:
    """Selects experts for each row by its own policy, and lists the pairs.

    Args:
        u: [T, D] what the routers read.
        modality: int8 [T], values of Modality; a padding row has -1 and gets no expert.
        policy: int8 [T], CAUSAL, CALIBRATED, EXPERT_CHOICE or THRESHOLD.
        taken: bool [T], in a depth-routed layer the rows that it computes.
        chosen: bool [T, E], what rows under expert choice selected; they select nothing without.
    """
    selected, weights = select(u, modality, policy, routers, taken=taken, chosen=chosen)
    return Pairs.of(selected, weights, routers.max_group, out)


def select(
    u: Tensor,
    modality: Tensor,
    policy: Tensor,
    routers: RouterWeights,
    *,
    taken: Tensor | None = None,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selected bool [T, E] and routing weights float32 [T, E], arguments as those of `route`."""
    eligible = modality >= 0
    if taken is not None:
        eligible = eligible & taken
    first, count, router = routers.groups[modality.long().clamp_min(0)].unbind(1)
    expert = torch.arange(routers.num_experts, device=u.device)
    inside = (expert >= first[:, None]) & (expert < (first + count)[:, None]) & eligible[:, None]
    logits = F.linear(u.float(), routers.main)
    auxiliary = torch.full_like(logits, float("-inf"))
    if routers.fc1.shape[1]:
        for number, fc1 in enumerate(routers.fc1):
            mine = inside & (router == number)[:, None]
            scores = reference.router_hidden(u, fc1, routers.fc2)
            auxiliary = torch.where(mine, scores, auxiliary)
    code = policy[:, None]
    selected = torch.where(code == CAUSAL, auxiliary > 0, logits > 0)
    selected = torch.where(code == CALIBRATED, logits > routers.thresholds, selected)
    by_choice = torch.zeros_like(selected) if chosen is None else chosen
    selected = torch.where(code == EXPERT_CHOICE, by_choice, selected)
    has_router = (router >= 0)[:, None]
    selected = torch.where(has_router, selected, True) & inside
    return selected, torch.where(has_router, logits.sigmoid(), 1.0)
