"""Refuses arguments that a kernel would misread: behind it lies unchecked pointer arithmetic."""

from __future__ import annotations

from torch import Tensor


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Of this shape, rows anywhere but each of them one stretch of memory; -1 is any size.

    Raises:
        ValueError: with what was wanted and what came.
    """
    got = tuple(tensor.shape)
    if len(got) != len(shape) or any(w not in (-1, g) for g, w in zip(got, shape, strict=True)):
        raise ValueError(f"{name} must be {list(shape)}, got {list(got)}")
    stride = 1
    for size, step in zip(reversed(got[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and step != stride:
            raise ValueError(f"{name} {list(got)} has gaps in its rows: {tensor.stride()}")
        stride *= size
    if len(got) == 1 and got[0] > 1 and tensor.stride(0) != 1:
        raise ValueError(f"{name} {list(got)} has gaps: {tensor.stride()}")


def check_head_dim(head_dim: int) -> None:
    """Powers of two that fit into a tile.

    Raises:
        ValueError: naming the size.
    """
    if head_dim not in (16, 32, 64, 128):
        raise ValueError(f"head_dim must be a power of two from 16 to 128, got {head_dim}")
