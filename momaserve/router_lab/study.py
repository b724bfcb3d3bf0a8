"""What every study of a report is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from momaserve.config import RoutingPolicy
from momaserve.router_lab.passes import Lab, Pass
from momaserve.router_lab.policies import Policy
from momaserve.router_lab.progress import Progress
from momaserve.router_lab.selections import Seen, decided, mean_selected
from momaserve.router_lab.source import LabData
from momaserve.router_lab.statistics import Bootstrap, Sums
from momaserve.training.packing import PackedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a user may choose. A part of the report is found again while what it uses agrees."""

    batches: int = 10
    """Scored batches of each split."""
    bootstrap: int = 1000
    """Resamples."""
    seed: int = 0
    samples: int = 150
    """Items of each split whose pictures are drawn and named."""
    fit_steps: int = 400
    """Steps that variants of routers are fitted for."""
    quick: bool = False
    """Fewer points on every curve."""


@dataclass(slots=True, kw_only=True)
class Study:
    """One checkpoint, the rows to measure it on, and how."""

    lab: Lab
    data: LabData
    checkpoint: Path
    settings: Settings
    bootstrap: Bootstrap
    progress: Progress
    baseline: Lab | None = None
    """A model to compare a depth-routed one with."""

    def begin(self, name: str, num_passes: int) -> None:
        self.progress.begin(name, num_passes)

    def run(
        self, rows: PackedRows, policy: Policy, number: int, *, with_scores: bool = False
    ) -> Pass:
        """One pass, which the progress counts."""
        found = self.lab.run(rows, policy, number, with_scores=with_scores)
        self.progress.step()
        return found

    def run_all(self, batches: Sequence[PackedRows], policy: Policy) -> Trial:
        """A policy over all batches."""
        trial = Trial()
        for number, rows in enumerate(batches):
            trial.add(self.run(rows, policy, number))
        return trial

    def decided(self, sites: Mapping[str, Seen], policy: RoutingPolicy) -> dict[str, Seen]:
        """What a policy decides from the hidden states of a pass; {} where the model cannot."""
        return decided(sites, self.lab.routers, policy)

    @property
    def kinds(self) -> list[str]:
        """Kinds of routers that the model has: names of groups, and "depth"."""
        return list(dict.fromkeys(name.partition(".")[2] for name in self.lab.routers))

    @property
    def has_depth(self) -> bool:
        return self.lab.model.config.depth_routing is not None

    def points(self, values: Sequence[float]) -> Sequence[float]:
        """Every second point of a sweep if it is to be quick; the ends are kept."""
        if not self.settings.quick:
            return values
        return [v for i, v in enumerate(values) if i % 2 == 0 or i == len(values) - 1]


class Trial:
    """One policy over several batches: losses, and how much was selected and changed."""

    def __init__(self) -> None:
        self._losses: list[Sums] = []
        self._selected: dict[str, tuple[int, int]] = {}
        self._changed: dict[str, tuple[int, int]] = {}

    def add(self, found: Pass) -> None:
        self._losses.append(found.losses)
        _add(self._selected, mean_selected(found.sites))
        _add(self._changed, found.changed)

    @property
    def losses(self) -> Sums:
        """[D, 4] over all documents of all batches."""
        return np.concatenate(self._losses)

    @property
    def experts_per_token(self) -> dict[str, float]:
        """Mean over tokens and layers, by group; of "depth" the share that is taken."""
        return {kind: pairs / max(1, tokens) for kind, (pairs, tokens) in self._selected.items()}

    @property
    def changed(self) -> dict[str, float]:
        """Share of decisions that edits changed, by EXPERTS and DEPTH."""
        return {part: n / max(1, total) for part, (n, total) in self._changed.items()}


def _add(totals: dict[str, tuple[int, int]], more: Mapping[str, tuple[int, int]]) -> None:
    for name, (count, total) in more.items():
        before = totals.get(name, (0, 0))
        totals[name] = (before[0] + count, before[1] + total)
