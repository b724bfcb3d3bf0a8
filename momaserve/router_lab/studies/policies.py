"""Routers and losses under every policy, against batch-level expert choice."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from momaserve.config import RoutingPolicy
from momaserve.router_lab.comparison import served_difference
from momaserve.router_lab.losses import describe_losses
from momaserve.router_lab.policies import CAUSAL, EXPERT_CHOICE, POLICIES, Policy, part_of
from momaserve.router_lab.selections import (
    AGREEMENTS,
    SERVED,
    RouterScores,
    Seen,
    SelectionCounts,
    SiteCounts,
    auroc,
    kind_of,
    layer_of,
    reliability,
    variation,
)
from momaserve.router_lab.statistics import Sums
from momaserve.router_lab.study import Study
from momaserve.training.packing import PackedRows

_NUM_PICTURES = 4
"""Pictures whose routing is drawn."""


def study_policies(study: Study) -> dict[str, Any]:
    """One pass per policy and batch; that of expert choice also gives every router's labels."""
    policies = [policy for policy in POLICIES if study.lab.missing_for(policy) is None]
    batches = study.data.splits
    study.begin("policies", len(policies) * sum(len(rows) for rows in batches.values()))
    return {
        "skipped": {
            policy.name: study.lab.missing_for(policy)
            for policy in POLICIES
            if policy not in policies
        },
        "splits": {name: _split(study, rows, policies) for name, rows in batches.items()},
        "pictures": _routing_of_pictures(study, batches["train"]),
    }


def _split(
    study: Study, batches: Sequence[PackedRows], policies: Sequence[Policy]
) -> dict[str, Any]:
    losses: dict[str, list[Sums]] = {policy.name: [] for policy in policies}
    in_pass = {policy.name: SelectionCounts() for policy in policies}
    at_states = {str(policy): SelectionCounts() for policy in SERVED}
    scores = RouterScores()
    for number, rows in enumerate(batches):
        oracle = study.run(rows, EXPERT_CHOICE, number, with_scores=True)
        losses[EXPERT_CHOICE.name].append(oracle.losses)
        in_pass[EXPERT_CHOICE.name].add(oracle.sites, oracle.sites, rows)
        scores.add(oracle.sites)
        for served in SERVED:
            decided = study.decided(oracle.sites, served)
            if decided:
                at_states[str(served)].add(oracle.sites, decided, rows)
        for policy in policies:
            if policy is not EXPERT_CHOICE:
                found = study.run(rows, policy, number)
                losses[policy.name].append(found.losses)
                in_pass[policy.name].add(oracle.sites, found.sites, rows)
    sums = {name: np.concatenate(each) for name, each in losses.items()}
    at_states = {name: counts for name, counts in at_states.items() if counts.kinds}
    return {
        "documents": len(sums[EXPERT_CHOICE.name]),
        "tokens": dict(
            zip(("text", "image"), sums[EXPERT_CHOICE.name].sum(0)[2:].astype(int), strict=True)
        ),
        "loss": describe_losses(sums, EXPERT_CHOICE.name, study.bootstrap),
        "served_difference": served_difference(sums, at_states, study.bootstrap),
        "agreement": {
            "at_expert_choice": _agreements(study, at_states),
            "in_pass": _agreements(study, in_pass),
        },
        "error_rate": {name: _error_rate(counts) for name, counts in at_states.items()},
        "use": {name: _use(counts) for name, counts in in_pass.items()},
        "layers": {
            "at_expert_choice": _layers(at_states),
            "in_pass": _layers(in_pass),
        },
        "routers": [
            row
            for name, counts in at_states.items()
            for row in _per_expert(study, name, counts, scores)
        ],
        "calibration": _calibration(study, scores),
    }


def _agreements(study: Study, counts: Mapping[str, SelectionCounts]) -> dict[str, Any]:
    """By policy and kind of router, with intervals."""
    return {
        name: {
            kind: {
                measure: study.bootstrap.estimate(statistic, each.documents(kind)).to_dict()
                for measure, statistic in AGREEMENTS.items()
            }
            | _masses(each, kind)
            for kind in each.kinds
        }
        for name, each in counts.items()
    }


def _error_rate(counts: SelectionCounts) -> dict[str, float]:
    """Share of wrong decisions on the oracle's hidden states, by EXPERTS and DEPTH."""
    totals: dict[str, NDArray[np.int64]] = {}
    for name, site in counts.sites.items():
        part = part_of(kind_of(name))
        totals[part] = totals.get(part, np.zeros(4, dtype=np.int64)) + site.confusion.sum(0)
    return {part: float(1 - AGREEMENTS["accuracy"](total)) for part, total in totals.items()}


def _masses(counts: SelectionCounts, kind: str) -> dict[str, float]:
    return _shares([each for name, each in counts.sites.items() if kind_of(name) == kind])


def _shares(sites: Sequence[SiteCounts]) -> dict[str, float]:
    """Of the weight that the oracle selects: what is missed, and what is added to it."""
    selected, missed, added = np.sum([site.mass for site in sites], axis=0).tolist()
    whole = max(selected, 1e-12)
    return {"mass_missed": missed / whole, "mass_added": added / whole}


def _use(counts: SelectionCounts) -> dict[str, Any]:
    """By kind: how many experts tokens get, and how evenly experts are loaded."""
    found: dict[str, Any] = {}
    for kind in counts.kinds:
        sites = [site for name, site in counts.sites.items() if kind_of(name) == kind]
        uneven = [value for site in sites if (value := variation(site.load)) is not None]
        found[kind] = _experts_per_token(sites) | {
            "load_variation": {"mean": float(np.mean(uneven)), "max": float(np.max(uneven))}
            if uneven
            else None,
        }
    return found


def _experts_per_token(sites: Sequence[SiteCounts]) -> dict[str, Any]:
    histogram = np.sum([site.histogram for site in sites], axis=0)
    tokens = max(1, int(histogram.sum()))
    return {
        "experts_per_token": float((histogram * np.arange(len(histogram))).sum() / tokens),
        "histogram": (histogram / tokens).tolist(),
        "without_expert": float(histogram[0] / tokens),
    }


def _layers(counts: Mapping[str, SelectionCounts]) -> list[dict[str, Any]]:
    """A row per policy, layer and kind."""
    return [
        {"policy": policy, "layer": layer_of(name), "kind": kind_of(name)}
        | _experts_per_token([site])
        | {"load_variation": variation(site.load)}
        | _shares([site])
        for policy, each in counts.items()
        for name, site in each.sites.items()
    ]


def _per_expert(
    study: Study, policy: str, counts: SelectionCounts, scores: RouterScores
) -> list[dict[str, Any]]:
    """A row per layer, kind and expert."""
    rows = []
    which = "aux" if policy == RoutingPolicy.CAUSAL else "main"
    for name, site in counts.sites.items():
        logits, labels = scores.of(name, which), scores.of(name, "labels")
        assert logits is not None
        assert labels is not None
        for expert, confusion in enumerate(site.confusion):
            with np.errstate(divide="ignore", invalid="ignore"):
                values = {key: float(each(confusion)) for key, each in AGREEMENTS.items()}
            row = {"policy": policy, "layer": layer_of(name), "kind": kind_of(name)}
            row |= {
                "expert": expert,
                **values,
                "auroc": auroc(logits[:, expert], labels[:, expert]),
            }
            rows.append(row)
            if which == "aux":
                chance = _sigmoid(logits[:, expert])
                row["calibration_error"] = reliability(chance, labels[:, expert]).expected_error
            row["load"] = int(site.load[expert])
            row["wanted_load"] = int(confusion[0] + confusion[2])
    return rows


def _calibration(study: Study, scores: RouterScores) -> dict[str, Any]:
    """Of auxiliary routers, all layers and experts of a kind together."""
    found: dict[str, Any] = {}
    for kind in study.kinds:
        logits: list[NDArray[Any]] = []
        labels: list[NDArray[Any]] = []
        for name in scores.sites:
            aux, wanted = scores.of(name, "aux"), scores.of(name, "labels")
            if kind_of(name) == kind and aux is not None and wanted is not None:
                logits.append(aux.flatten())
                labels.append(wanted.flatten())
        if not logits:
            continue
        bins = reliability(_sigmoid(np.concatenate(logits)), np.concatenate(labels))
        found[kind] = {
            "counts": bins.counts.tolist(),
            "probability": bins.probability.tolist(),
            "frequency": bins.frequency.tolist(),
            "expected_error": bins.expected_error,
            "auroc": auroc(np.concatenate(logits), np.concatenate(labels)),
        }
    return found


def _sigmoid(logits: NDArray[Any]) -> NDArray[Any]:
    result: NDArray[Any] = np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))
    return result


def _routing_of_pictures(study: Study, batches: Sequence[PackedRows]) -> list[dict[str, Any]]:
    """The first few different pictures, and which experts took each of their tokens."""
    config, model = study.lab.model.config, study.data.pictures
    if config.image is None or model is None:
        return []
    found: list[dict[str, Any]] = []
    known: set[tuple[int, ...]] = set()
    length = config.image.tokens_per_image
    for number, rows in enumerate(batches):
        oracle, causal = None, None
        ids = rows.token_ids.flatten().tolist()
        for place, token in enumerate(ids):
            codes = tuple(ids[place + 1 : place + 1 + length])
            if token != config.image.begin_token_id or codes in known:
                continue
            if ids[place + 1 + length : place + 2 + length] != [config.image.end_token_id]:
                continue
            if len(found) == _NUM_PICTURES:
                return found
            known.add(codes)
            if oracle is None:
                oracle = study.lab.run(rows, EXPERT_CHOICE, number).sites
                if study.lab.missing_for(CAUSAL) is None:
                    causal = study.lab.run(rows, CAUSAL, number).sites
            span = slice(place + 1, place + 1 + length)
            maps = {EXPERT_CHOICE.name: _bits(oracle, span)}
            if causal is not None:
                maps[CAUSAL.name] = _bits(causal, span)
            pixels = model.decode(torch.tensor([codes]) - config.image.first_token_id)[0]
            found.append({"png": _png(pixels), "grid": list(config.image.grid), "maps": maps})
    return found


def _bits(sites: Mapping[str, Seen], span: slice) -> dict[str, list[int]]:
    """By router: for each token of a picture, a bit for each expert that took it."""
    found = {}
    for name, seen in sites.items():
        if bool(seen.eligible[span].any()):
            powers = 2 ** torch.arange(seen.selected.shape[1])
            found[name] = (seen.selected[span].cpu() * powers).sum(1).tolist()
    return found


def _png(pixels: torch.Tensor) -> str:
    """[3, S, S] in [-1, 1] as a PNG in base64."""
    values = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()
