"""What one forward pass is told: tokens, their modality, and how they route and attend.

Everything a layer needs arrives here; layers hold weights and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.modality import Modality

POLICY_CODES = {policy: code for code, policy in enumerate(RoutingPolicy)}
"""How policies are written into `RoutingPlan.policy`."""


class RouterNoise(Protocol):
    """Perturbs the scores of expert routers, in training alone: both selection and weight."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Main logits [T, E] of one expert group -> logits; called once per group and layer."""
        ...


class SelectionRule(Protocol):
    """Replaces what a policy selected, in studies of routing alone."""

    def __call__(
        self, layer: int, name: str, x: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> Tensor:
        """What the layers then use: bool [T, E], never a token that is not eligible.

        Args:
            name: the expert group, or "depth" for the depth router of the layer.
            x: [T, D] what the routers read.
            logits: [T, E] of the main router.
            eligible: bool [T].
            selected: bool [T, E] by the policy of each token.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingPlan:
    """Which policy routes each token of the batch, known on the host before the step."""

    policies: frozenset[RoutingPolicy]
    """All policies that occur."""
    policy: Tensor
    """int8 [T], codes of POLICY_CODES."""
    segments: Tensor
    """int64 [T], the expert-choice scope of each token; -1 for tokens under other policies."""
    num_segments: int
    noise: RouterNoise | None = None
    rule: SelectionRule | None = None


class Attention(Protocol):
    """Causal attention of the batch's tokens over their own sequences, and where K/V live."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, taken: Tensor | None) -> Tensor:
        """q [T, H, K], k and v [T, G, K] -> [T, H, K].

        Where `taken` (bool [T]) is False the layer skips the token: it is invisible as a key,
        now and to later tokens, and its output row may be anything finite.
        """
        ...


class RoutingObserver(Protocol):
    """Is told every selection that a forward pass makes (metrics, reports, training)."""

    def experts(
        self, layer: int, group: str, u: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        """u [T, D], main logits [T, E], eligible [T], selected [T, E] of one expert group."""
        ...

    def depth(self, layer: int, x: Tensor, logits: Tensor, eligible: Tensor, taken: Tensor) -> None:
        """x [T, D], main logits [T], eligible [T] and taken [T] of a depth-routed layer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """Tokens of one forward pass, flattened over requests."""

    token_ids: Tensor
    """int64 [T]."""
    positions: Tensor
    """int64 [T], position of each token in its own sequence."""
    modality: Tensor
    """int8 [T], values of Modality."""
    modalities: frozenset[Modality]
    """Modalities that occur, known on the host: groups without tokens are not run."""
    routing: RoutingPlan
    attention: Attention | None = None
    """None where a backend brings its own."""
    observer: RoutingObserver | None = None
