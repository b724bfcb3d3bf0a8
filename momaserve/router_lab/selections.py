"""What every router of a pass selected: recorded, compared with the oracle, and summed up.

The oracle is batch-level expert choice, what a model is trained under. Counts are kept per
expert, for tables and maps, and per document, for intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from momaserve.config import RoutingPolicy
from momaserve.layers.routing import Router
from momaserve.router_lab.losses import documents_of_tokens
from momaserve.router_lab.statistics import Statistic, Sums
from momaserve.training.packing import PackedRows

SERVED = (RoutingPolicy.CAUSAL, RoutingPolicy.CALIBRATED, RoutingPolicy.THRESHOLD)
"""Policies that decide from a token alone, so from recorded scores."""


def kind_of(site: str) -> str:
    """The expert group's name, or "depth", of a router named as `fit_routers` names it."""
    return site.partition(".")[2]


def layer_of(site: str) -> int:
    return int(site.partition(".")[0])


@dataclass(frozen=True, slots=True)
class Seen:
    """One router in one pass over T tokens."""

    logits: Tensor
    """[T, E] of the main router."""
    eligible: Tensor
    """bool [T]: tokens that it had to decide on, padding left out."""
    selected: Tensor
    """bool [T, E], False where not eligible."""
    aux: Tensor | None
    """[T, E] logits of the auxiliary router, where they were asked for."""

    def decided_by(self, policy: RoutingPolicy, router: Router) -> Seen | None:
        """The same hidden states under another policy; None where the checkpoint lacks it."""
        if policy is RoutingPolicy.CAUSAL:
            scores, cut = self.aux, torch.zeros(1)
        elif policy is RoutingPolicy.CALIBRATED:
            if router.threshold_logits is None:
                return None
            scores, cut = self.logits, router.threshold_logits
        else:
            scores, cut = self.logits, torch.zeros(1)
        if scores is None:
            return None
        chosen = (scores > cut.to(scores.device)) & self.eligible.unsqueeze(1)
        return replace(self, selected=chosen)


class Recorder:
    """A `RoutingObserver` that keeps every selection of a pass, by router, in host memory."""

    def __init__(self, rows: PackedRows, scored_by: Mapping[str, Router] | None = None) -> None:
        """`scored_by`: routers whose auxiliary logits are recorded too."""
        self._real = ~rows.is_padding.flatten()
        self._routers = scored_by or {}
        self.sites: dict[str, Seen] = {}

    def experts(
        self, layer: int, group: str, u: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        self._keep(f"{layer}.{group}", u, logits, eligible, selected)

    def depth(self, layer: int, x: Tensor, logits: Tensor, eligible: Tensor, taken: Tensor) -> None:
        self._keep(f"{layer}.depth", x, logits.unsqueeze(1), eligible, taken.unsqueeze(1))

    def _keep(
        self, site: str, x: Tensor, logits: Tensor, eligible: Tensor, selected: Tensor
    ) -> None:
        real = eligible & self._real
        router = self._routers.get(site)
        aux = None if router is None or router.aux is None else router.aux(x).cpu()
        chosen = selected & real.unsqueeze(1)
        self.sites[site] = Seen(logits.cpu(), real.cpu(), chosen.cpu(), aux)


def decided(
    sites: Mapping[str, Seen], routers: Mapping[str, Router], policy: RoutingPolicy
) -> dict[str, Seen]:
    """What a policy decides from the hidden states of a pass; {} where the model cannot."""
    found = {name: seen.decided_by(policy, routers[name]) for name, seen in sites.items()}
    return {name: seen for name, seen in found.items() if seen is not None}


def mean_selected(sites: Mapping[str, Seen]) -> dict[str, tuple[int, int]]:
    """By kind of router: (token, expert) pairs selected, and tokens decided on."""
    found: dict[str, tuple[int, int]] = {}
    for site, seen in sites.items():
        pairs, tokens = found.get(kind_of(site), (0, 0))
        pairs, tokens = pairs + int(seen.selected.sum()), tokens + int(seen.eligible.sum())
        found[kind_of(site)] = (pairs, tokens)
    return found


@dataclass(slots=True)
class SiteCounts:
    """Counts of one router against the oracle. Letters: E experts."""

    confusion: NDArray[np.int64]
    """[E, 4]: true positive, false positive, false negative, true negative."""
    histogram: NDArray[np.int64]
    """[E + 1]: tokens with 0, 1, ... experts."""
    mass: NDArray[np.float64]
    """[3]: weight that the oracle selects, of it missed, and wrongly added."""

    @property
    def load(self) -> NDArray[np.int64]:
        """[E]: tokens that each expert took."""
        return self.confusion[:, 0] + self.confusion[:, 1]


class SelectionCounts:
    """One way to select, against the oracle, over any number of batches."""

    def __init__(self) -> None:
        self.sites: dict[str, SiteCounts] = {}
        self._documents: dict[str, list[Sums]] = {}
        self._num_documents: list[int] = []

    def add(self, wanted: Mapping[str, Seen], given: Mapping[str, Seen], rows: PackedRows) -> None:
        """Both of the same rows; `given` may have routers missing, which are then left out.

        Where the two passes differ in which tokens a depth-routed layer took, a token that only
        one of them decided on counts as selected by no expert in the other.
        """
        owner = documents_of_tokens(rows).cpu()
        num_documents = max(0, int(owner.max()) + 1)
        here: dict[str, Sums] = {}
        for site, theirs in given.items():
            ours = wanted[site]
            eligible = ours.eligible | theirs.eligible
            a, b = ours.selected[eligible], theirs.selected[eligible]
            cells = torch.stack((a & b, ~a & b, a & ~b, ~a & ~b), dim=-1)  # [N, E, 4]
            counts = self._counts(site, a.shape[1])
            counts.confusion += cells.sum(0).cpu().numpy()
            per_token = theirs.selected[theirs.eligible].sum(1)
            bins = torch.bincount(per_token, minlength=a.shape[1] + 1)
            counts.histogram += bins.cpu().numpy()
            weight_a, weight_b = ours.logits.sigmoid()[eligible], theirs.logits.sigmoid()[eligible]
            masses = (weight_a[a].sum(), weight_a[a & ~b].sum(), weight_b[b & ~a].sum())
            counts.mass += np.array([float(mass) for mass in masses])
            sums = torch.zeros(num_documents, 4, dtype=torch.float64)
            sums.index_add_(0, owner[eligible], cells.sum(1).double())
            kind = kind_of(site)
            here[kind] = here.get(kind, np.zeros((num_documents, 4))) + sums.numpy()
        for kind, sums_of_kind in here.items():
            # A kind that earlier batches had no tokens of: their documents have zeros.
            known = self._documents.setdefault(
                kind, [np.zeros((count, 4)) for count in self._num_documents]
            )
            known.append(sums_of_kind)
        for kind, known in self._documents.items():
            if kind not in here:
                known.append(np.zeros((num_documents, 4)))
        self._num_documents.append(num_documents)

    def _counts(self, site: str, num_experts: int) -> SiteCounts:
        if site not in self.sites:
            self.sites[site] = SiteCounts(
                np.zeros((num_experts, 4), dtype=np.int64),
                np.zeros(num_experts + 1, dtype=np.int64),
                np.zeros(3),
            )
        return self.sites[site]

    @property
    def kinds(self) -> list[str]:
        return list(self._documents)

    def documents(self, kind: str) -> Sums:
        """[D, 4] confusion counts of every document, all layers and experts of a kind."""
        return np.concatenate(self._documents[kind])


class RouterScores:
    """Scores and the oracle's labels of every router over all batches, for exact ranks."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[str, list[NDArray[Any]]]] = {}

    def add(self, sites: Mapping[str, Seen]) -> None:
        for site, seen in sites.items():
            parts = self._parts.setdefault(site, {"labels": [], "main": [], "aux": []})
            parts["labels"].append(seen.selected[seen.eligible].cpu().numpy())
            parts["main"].append(seen.logits[seen.eligible].float().cpu().numpy())
            if seen.aux is not None:
                parts["aux"].append(seen.aux[seen.eligible].float().cpu().numpy())

    @property
    def sites(self) -> list[str]:
        return list(self._parts)

    def of(self, site: str, which: str) -> NDArray[Any] | None:
        """[N, E] "labels", "main" or "aux" logits; None where there are none."""
        parts = self._parts[site][which]
        return np.concatenate(parts) if parts else None


def accuracy(counts: NDArray[Any]) -> NDArray[np.float64]:
    """From confusion counts [..., 4]."""
    right: NDArray[np.float64] = (counts[..., 0] + counts[..., 3]) / counts.sum(-1)
    return right


def precision(counts: NDArray[Any]) -> NDArray[np.float64]:
    return counts[..., 0] / (counts[..., 0] + counts[..., 1])  # type: ignore[no-any-return]


def recall(counts: NDArray[Any]) -> NDArray[np.float64]:
    return counts[..., 0] / (counts[..., 0] + counts[..., 2])  # type: ignore[no-any-return]


def f1(counts: NDArray[Any]) -> NDArray[np.float64]:
    wrong = counts[..., 1] + counts[..., 2]
    return 2 * counts[..., 0] / (2 * counts[..., 0] + wrong)  # type: ignore[no-any-return]


AGREEMENTS: Mapping[str, Statistic] = {
    "accuracy": accuracy,
    "precision": precision,
    "recall": recall,
    "f1": f1,
}


def auroc(scores: NDArray[Any], labels: NDArray[np.bool_]) -> float | None:
    """Chance that a selected pair scores above one that is not (ties count half), by ranks.

    None where all labels are alike. Both [N].
    """
    num_positive = int(labels.sum())
    num_negative = len(labels) - num_positive
    if not num_positive or not num_negative:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[inverse]  # mean rank of each value, from 1
    excess = ranks[labels].sum() - num_positive * (num_positive + 1) / 2
    return float(excess / (num_positive * num_negative))


@dataclass(frozen=True, slots=True)
class Reliability:
    """How often what a router calls probable comes true, in bins of equal width."""

    counts: NDArray[np.int64]
    """[B]."""
    probability: NDArray[np.float64]
    """[B] mean predicted probability; nan in an empty bin."""
    frequency: NDArray[np.float64]
    """[B] share of labels that are True; nan in an empty bin."""

    @property
    def expected_error(self) -> float:
        """Expected calibration error: mean gap of the two, weighted by the bins' counts."""
        gaps = np.nan_to_num(np.abs(self.probability - self.frequency))
        return float((gaps * self.counts).sum() / max(1, self.counts.sum()))


def reliability(
    probabilities: NDArray[Any], labels: NDArray[np.bool_], num_bins: int = 15
) -> Reliability:
    """Both [N], probabilities in [0, 1]; a bin holds its lower edge, the last one 1 too."""
    place = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(place, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        probability = np.bincount(place, probabilities, num_bins) / counts
        frequency = np.bincount(place, labels.astype(np.float64), num_bins) / counts
    return Reliability(counts, probability, frequency)


def variation(loads: NDArray[Any]) -> float | None:
    """Coefficient of variation of the experts' loads [E]; 0 is balance, None without load."""
    mean = loads.mean()
    return float(loads.std() / mean) if mean else None
