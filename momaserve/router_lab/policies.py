"""Ways to select, as small objects: a serving policy, and edits that replace what it selected."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.kernels import reference
from momaserve.layers.routing import Router

DEPTH = "depth"
EXPERTS = "experts"
FLIPS = ("uniform", "drop", "add")
"""Any decision; only selected pairs lose their expert; only others get one."""


def part_of(name: str) -> str:
    """DEPTH or EXPERTS, from the name that a `SelectionRule` is given."""
    return DEPTH if name == DEPTH else EXPERTS


@dataclass(frozen=True, slots=True)
class Site:
    """One router while it decides on the T tokens of a batch."""

    name: str
    """Layer and group, as `3.image`, or `3.depth`."""
    router: Router
    x: Tensor
    """[T, D] what it reads."""
    logits: Tensor
    """[T, E] of the main router."""
    eligible: Tensor
    """bool [T], padding left out."""
    seed: str

    @property
    def part(self) -> str:
        return part_of(self.name.partition(".")[2])

    def uniform(self, label: str) -> Tensor:
        """[T, E] in [0, 1): a pure function of seed, router and label."""
        digest = hashlib.sha256(f"{self.seed}/{self.name}/{label}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.rand(self.logits.shape, generator=generator, dtype=torch.float64)
        return drawn.to(self.logits.device)


class Edit(Protocol):
    """Replaces a selection; tokens that are not eligible are taken out again afterwards."""

    def __call__(self, site: Site, selected: Tensor) -> Tensor:
        """bool [T, E] -> bool [T, E]."""
        ...


@dataclass(frozen=True, slots=True)
class Flip:
    """Turns a share of a router's decisions around.

    The number of flips is the share of all (token, expert) decisions, whatever the kind, so equal
    shares mean equally many wrong decisions; a fraction of a flip is left to the seed. The flips
    of a share are among those of every larger one.
    """

    share: float
    kind: str
    """One of FLIPS."""
    part: str
    """EXPERTS or DEPTH."""

    def __call__(self, site: Site, selected: Tensor) -> Tensor:
        if site.part != self.part:
            return selected
        may = site.eligible.unsqueeze(1).expand_as(selected)
        wanted = self.share * int(may.sum())
        if self.kind == "drop":
            may = may & selected
        elif self.kind == "add":
            may = may & ~selected
        extra = float(site.uniform("fraction").flatten()[0]) < wanted % 1
        count = min(int(wanted) + extra, int(may.sum()))
        order = site.uniform("flip").masked_fill(~may, 2.0).flatten().argsort()
        flipped = torch.zeros_like(selected).flatten()
        flipped[order[:count]] = True
        return selected ^ flipped.view_as(selected)


@dataclass(frozen=True, slots=True)
class RandomChoice:
    """Every expert takes as many tokens as under expert choice, any ones."""

    def __call__(self, site: Site, selected: Tensor) -> Tensor:
        return _best(site.uniform("choice"), site, site.router.capacity)


@dataclass(frozen=True, slots=True)
class Everything:
    """Every expert takes every token, and no layer skips one."""

    def __call__(self, site: Site, selected: Tensor) -> Tensor:
        return torch.ones_like(selected)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Expert choice over the batch with another capacity: `factor` times the trained one."""

    factor: float
    part: str

    def __call__(self, site: Site, selected: Tensor) -> Tensor:
        if site.part != self.part:
            return selected
        trained = site.router.capacity
        if self.factor != 1:
            trained = min(1.0, self.factor * (trained or 1 / selected.shape[1]))
        return _best(site.logits, site, trained)


def _best(scores: Tensor, site: Site, capacity: float | None) -> Tensor:
    scope = torch.where(site.eligible, 0, -1)
    return reference.expert_choice(scores, site.eligible, scope, 1, capacity)


@dataclass(frozen=True, slots=True)
class Cut:
    """Selects where a router's logit is above a cut of its own."""

    scores: str
    """"aux" or "main"."""
    cuts: Mapping[str, Tensor]
    """[E] by the router's name; routers without one are left alone."""

    def __call__(self, site: Site, selected: Tensor) -> Tensor:
        cut = self.cuts.get(site.name)
        if cut is None:
            return selected
        logits = site.logits
        if self.scores == "aux":
            assert site.router.aux is not None, "a cut of auxiliary routers that are not there"
            logits = site.router.aux(site.x)
        return logits > cut.to(logits.device)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a pass selects: a policy of the engine, then edits in their order."""

    name: str
    base: RoutingPolicy
    edits: tuple[Edit, ...] = ()
    is_prompt_scoped: bool = False
    """Expert choice over each document's prompt, and causal after it, as prompts are served."""


EXPERT_CHOICE = Policy("expert_choice", RoutingPolicy.EXPERT_CHOICE)
"""The training condition: over the whole batch, future tokens included."""
CAUSAL = Policy("causal", RoutingPolicy.CAUSAL)
CALIBRATED = Policy("calibrated", RoutingPolicy.CALIBRATED)
POLICIES = (
    EXPERT_CHOICE,
    Policy("expert_choice_prompt", RoutingPolicy.CAUSAL, is_prompt_scoped=True),
    CAUSAL,
    CALIBRATED,
    Policy("threshold", RoutingPolicy.THRESHOLD),
    Policy("random", RoutingPolicy.THRESHOLD, (RandomChoice(),)),
    Policy("all", RoutingPolicy.THRESHOLD, (Everything(),)),
)


class Rule:
    """A `SelectionRule` that applies the edits of a policy to one batch, and counts changes."""

    def __init__(
        self, edits: Sequence[Edit], routers: Mapping[str, Router], real: Tensor, seed: str
    ) -> None:
        """`real`: bool [T], False for padding."""
        self._edits = edits
        self._routers = routers
        self._real = real
        self._seed = seed
        self.changed: dict[str, tuple[int, int]] = {}
        """By EXPERTS or DEPTH: decisions that differ from the base policy's, and all of them."""

    def __call__(
        self, layer: int, name: str, x: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> Tensor:
        site_name, real = f"{layer}.{name}", eligible & self._real
        router = self._routers[site_name]
        site = Site(site_name, router, x, logits, real, self._seed)
        found = selected
        for edit in self._edits:
            found = edit(site, found)
        found = found & eligible.unsqueeze(1)
        changes = int(((found != selected) & real.unsqueeze(1)).sum())
        before, total = self.changed.get(part_of(name), (0, 0))
        decisions = int(real.sum()) * selected.shape[1]
        self.changed[part_of(name)] = (before + changes, total + decisions)
        return found
