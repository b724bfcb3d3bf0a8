"""Weights that a backend has packed for itself are given up by the torch module."""

from __future__ import annotations

from torch import nn


def give_up_matrices(module: nn.Module) -> None:
    """Frees all matrices of the module; whoever multiplies by one gets an error."""
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            give_up(parameter)


def give_up(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.new_empty(0)
