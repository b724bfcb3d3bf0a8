"""Fat programs: the interpreter's time goes by programs, and kernels have tests of their own with
the tiles that serve."""

from __future__ import annotations

import pytest

from momaserve.kernels.triton import experts, routing


def fatten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives launches of small models a few programs instead of hundreds."""
    direct = experts.DirectTiles(128, 32, 4, 32, 128, 4)
    grouped = experts.GroupedTiles(16, 128, 32, 4, 1, 32, 128, 4, 1, 1)
    monkeypatch.setattr(experts, "DIRECT_TILES", ((experts.DIRECT_ROWS, direct),))
    monkeypatch.setattr(experts, "GROUPED_TILES", ((1 << 30, grouped),))
    vector, matrix = routing.Tiles(1, 32, 0, 4, 1), routing.Tiles(16, 32, 64, 4, 1)
    monkeypatch.setattr(routing, "TILES", ((routing.VECTOR_ROWS, vector), (1 << 30, matrix)))
