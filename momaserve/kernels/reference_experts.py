"""Routed experts over a list of pairs, in plain torch: what the kernels must match.

Letters: T rows, D hidden, F expert hidden, Fp its padded size, E experts of one launch, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from momaserve.kernels.reference_routing import Pairs

PADDING = 128
"""Rows of `down` of a multiple of this size are read in whole vectors and need no masks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """SwiGLU experts of one size, numbered next to each other; contiguous, one number format."""

    gate: Tensor
    """[E, Fp, D]; rows from F on are not used."""
    up: Tensor
    """[E, Fp, D]."""
    down: Tensor
    """[E, D, Fp]; columns from F on are zero."""
    inner: int
    """F."""
    first: int = 0
    """Number of the first of them among all experts of the layer."""

    @classmethod
    def padded(
        cls, gate: Tensor, up: Tensor, down: Tensor, *, first: int = 0, multiple: int = PADDING
    ) -> ExpertWeights:
        """From gate and up [E, F, D] and down [E, D, F], with Fp the next `multiple` of F."""
        inner = gate.shape[1]
        extra = -inner % multiple
        gate, up = (F.pad(w, (0, 0, 0, extra)).contiguous() for w in (gate, up))
        down = F.pad(down, (0, extra)).contiguous()
        return cls(gate=gate, up=up, down=down, inner=inner, first=first)

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]


def experts(
    u: Tensor,
    pairs: Pairs,
    weights: ExpertWeights,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """Weighted sum of the experts of each row: float32 [T, D], zero for a row without expert.

    Args:
        u: [T, D] what the experts read, in the weights' number format.
        pairs: over all experts of the layer; those of other experts are left out.
        accumulate: add to `out`, as for a second size of experts.
    """
    if out is None:
        out = torch.zeros(u.shape, dtype=torch.float32, device=u.device)
    elif not accumulate:
        out.zero_()
    offsets = pairs.offsets.tolist()
    for number in range(weights.num_experts):
        mine = slice(offsets[weights.first + number], offsets[weights.first + number + 1])
        rows = pairs.tokens[mine].long()
        x = u[rows]
        inner = slice(weights.inner)
        hidden = F.silu(F.linear(x, weights.gate[number, inner]).float())
        hidden = hidden * F.linear(x, weights.up[number, inner]).float()
        y = F.linear(hidden.to(u.dtype), weights.down[number, :, inner]).float()
        out.index_add_(0, rows, y * pairs.weights[mine].unsqueeze(1))
    return out
