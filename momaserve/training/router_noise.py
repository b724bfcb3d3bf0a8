"""Gumbel-Sigmoid noise for the routers of an upcycled model (MoMa, 2407.21770, section 2.5).

Experts that start as copies of one another are told apart only by who is sent to them, so their
routers are perturbed while training: Sigmoid(x + G' - G'') with two independent Gumbel samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from momaserve.layers.batch import RouterNoise

NOISES = ("none", "gumbel")


class GumbelNoise:
    """Noise of one step: a pure function of seed, step and the order of calls.

    The difference of two Gumbel samples has the logistic distribution, whose quantile function
    is the logit, so one uniform number makes it. Drawn on the host: alike on every device.
    """

    def __init__(self, seed: int, step: int) -> None:
        self._generator = torch.Generator().manual_seed(seed * 1_000_003 + step)

    def __call__(self, logits: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        uniform = torch.rand(logits.shape, generator=self._generator, dtype=torch.float64)
        noise = uniform.clamp(1e-12, 1 - 1e-12).logit()
        return logits + noise.to(logits)


def noise_of_step(name: str | None, seed: int, step: int) -> RouterNoise | None:
    """The noise called `name`, one of NOISES; None is none."""
    return GumbelNoise(seed, step) if name == "gumbel" else None
