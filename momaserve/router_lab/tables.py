"""The numbers of a report as tables: plain cells, for the page and for whoever reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from momaserve.router_lab.findings import comparisons, signed, tally
from momaserve.router_lab.losses import MODALITIES

Estimate = Mapping[str, float | None]
_NAMES = {"train": "training data", "held_out": "held-out data"}


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a header and rows of cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_long: bool = False
    """Whether a reader should have to ask for it."""


def tables(parts: Mapping[str, Any]) -> dict[str, list[Table]]:
    """By the part that they belong to."""
    writers = {
        "policies": _policies,
        "noise": _noise,
        "thresholds": _thresholds,
        "shift": _shift,
        "generation": _generation,
        "better-routers": _better_routers,
    }
    return {name: list(writers[name](part)) for name, part in parts.items()}


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def interval(estimate: Estimate, digits: int = 4) -> str:
    """ "0.1234 (0.1200 to 0.1300)"."""
    low, high = estimate["low"], estimate["high"]
    if low is None or high is None:
        return number(estimate["value"], digits)
    return f"{number(estimate['value'], digits)} ({low:.{digits}f} to {high:.{digits}f})"


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def _policies(part: Mapping[str, Any]) -> Iterator[Table]:
    yield from _left_out(part, "policy")
    for split, found in part["splits"].items():
        about = f"{_NAMES[split]}, {found['documents']} documents"
        yield Table(
            f"Loss by policy on {about}",
            ("policy", "tokens", "nat per token", "perplexity", "above expert choice", "", "kept"),
            [
                (
                    policy,
                    modality,
                    interval(loss["nll"]),
                    number(loss["perplexity"]["value"], 3),
                    signed(loss["delta"]),
                    "–" if loss["delta_percent"] is None else f"{loss['delta_percent']:+.2f} %",
                    loss["kept"] or "–",
                )
                for policy, losses in found["loss"].items()
                for modality, loss in losses.items()
            ],
        )
        for where, title in (
            ("at_expert_choice", "on its hidden states"),
            ("in_pass", "in a pass of their own"),
        ):
            header = ("policy", "routers", "accuracy", "precision", "recall", "F1")
            yield Table(
                f"Routers against expert choice {title}, {about}",
                (*header, "weight missed", "weight added"),
                [
                    (
                        policy,
                        kind,
                        *(interval(row[m]) for m in ("accuracy", "precision", "recall", "f1")),
                        percent(row["mass_missed"]),
                        percent(row["mass_added"]),
                    )
                    for policy, kinds in found["agreement"][where].items()
                    for kind, row in kinds.items()
                ],
            )
        yield Table(
            f"Use of experts, {about}",
            ("policy", "routers", "experts per token", "without expert", "load CV, mean", "worst"),
            [
                (
                    policy,
                    kind,
                    number(row["experts_per_token"], 3),
                    percent(row["without_expert"]),
                    *(number((row["load_variation"] or {}).get(k), 3) for k in ("mean", "max")),
                )
                for policy, kinds in found["use"].items()
                for kind, row in kinds.items()
            ],
        )
        layers = found["layers"]
        rows = [("its hidden states", row) for row in layers["at_expert_choice"]]
        rows += [("a pass of its own", row) for row in layers["in_pass"]]
        yield Table(
            f"Every layer, {about}",
            ("policy", "in", "layer", "routers", "experts per token", "without expert", "load CV")
            + ("weight missed", "weight added", "share with 0, 1, ... experts"),
            [
                (
                    row["policy"],
                    where,
                    str(row["layer"]),
                    row["kind"],
                    number(row["experts_per_token"], 3),
                    percent(row["without_expert"]),
                    number(row["load_variation"], 3),
                    percent(row["mass_missed"]),
                    percent(row["mass_added"]),
                    " ".join(f"{share:.3f}" for share in row["histogram"]),
                )
                for where, row in rows
            ],
            is_long=True,
        )
        measures = ("accuracy", "precision", "recall", "f1", "auroc", "calibration_error")
        yield Table(
            f"Every expert, {about}",
            ("policy", "layer", "routers", "expert", *measures, "load", "wanted"),
            [
                (
                    row["policy"],
                    str(row["layer"]),
                    row["kind"],
                    str(row["expert"]),
                    *(number(row.get(measure)) for measure in measures),
                    str(row["load"]),
                    str(row["wanted_load"]),
                )
                for row in found["routers"]
            ],
            is_long=True,
        )


def _left_out(part: Mapping[str, Any], what: str) -> Iterator[Table]:
    if part["skipped"]:
        yield Table("Left out", (what, "why"), list(part["skipped"].items()))


def _noise(part: Mapping[str, Any]) -> Iterator[Table]:
    floors = part["floor"]
    yield Table(
        "Noise floor: decisions that bfloat16 weights and activations turn",
        ("policy", "expert decisions", "depth decisions", "text, nat", "image, nat"),
        [
            (
                policy,
                percent(floor["experts"], 3),
                percent(floor["depth"], 3),
                signed(floor["delta"]["text"]),
                signed(floor["delta"]["image"]),
            )
            for policy, floor in floors.items()
        ],
    )
    rows = []
    for curve in part["curves"]:
        floor = floors[curve["base"]][curve["part"]]
        rows += [
            (
                curve["base"],
                curve["part"],
                curve["kind"],
                percent(point["sigma"], 2),
                percent(point["flipped"], 2),
                percent(floor, 2),
                *(signed(point["loss"][modality]["delta"]) for modality in MODALITIES),
            )
            for point in curve["points"]
        ]
    header = ("policy", "decisions", "flips", "σ", "reached", "bf16 floor")
    yield Table("Loss above no noise, nat per token", (*header, *MODALITIES), rows, is_long=True)
    yield Table(
        "The σ at which the loss is 1 % up",
        ("policy", "decisions", "flips", *MODALITIES, "bf16 floor"),
        [
            (
                curve["base"],
                curve["part"],
                curve["kind"],
                *(_share(curve["one_percent"][modality]) for modality in MODALITIES),
                percent(floors[curve["base"]][curve["part"]], 2),
            )
            for curve in part["curves"]
        ],
    )
    if part["baseline"] is not None:
        yield Table(
            "The σ at which the model without depth is better",
            ("policy", "decisions", "flips", *MODALITIES),
            [
                (
                    curve["base"],
                    curve["part"],
                    curve["kind"],
                    *(_share(curve["loses_to_baseline"][modality]) for modality in MODALITIES),
                )
                for curve in part["curves"]
            ],
        )


def _share(estimate: Estimate) -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if value is None:
        return "none tried"
    if low is None:
        return percent(value, 2)
    most = "more" if high is None else f"{100 * high:.2f}"
    return f"{percent(value, 2)} ({100 * low:.2f} to {most})"


def _thresholds(part: Mapping[str, Any]) -> Iterator[Table]:
    yield Table(
        "Loss above the training condition, nat per token, by cut",
        ("sweep", "decisions", "setting", "experts per token", *MODALITIES),
        [
            (
                sweep["family"].replace("_", " "),
                sweep["part"],
                f"{point['setting']:g}",
                ", ".join(f"{k} {v:.3f}" for k, v in point["experts_per_token"].items()),
                *(signed(point["loss"][modality]["delta"]) for modality in MODALITIES),
            )
            for sweep in part["sweeps"]
            for point in sweep["points"]
        ],
        is_long=True,
    )


def _shift(part: Mapping[str, Any]) -> Iterator[Table]:
    points = [("as it is", 0.0, "", part["clean"])]
    for name, shift in part["shifts"].items():
        points += [(name, p["severity"], shift["unit"], p) for p in shift["points"]]
    yield Table(
        "Loss and agreement of routers by severity",
        ("shift", "severity", "unit", "policy", "nat per token", "above expert choice", "F1"),
        [
            (
                name,
                f"{severity:g}",
                unit,
                policy,
                ", ".join(f"{m} {number(each['nll']['value'])}" for m, each in loss.items()),
                ", ".join(f"{m} {signed(each['delta'])}" for m, each in loss.items()),
                ", ".join(
                    f"{kind} {number(row['f1']['value'])}"
                    for kind, row in point["agreement"].get(policy, {}).items()
                ),
            )
            for name, severity, unit, point in points
            for policy, loss in point["loss"].items()
        ],
        is_long=True,
    )
    yield from _left_out(part, "shift")


def compared(parts: Mapping[str, Any]) -> list[Table]:
    """Calibrated thresholds against auxiliary routers, in all conditions."""
    found = comparisons(parts)
    if not found:
        return []
    counts = tally(difference for _, difference in found)
    return [
        Table(
            "Conditions in which thresholds have clearly less loss than auxiliary routers, "
            "clearly more, or neither (95 % intervals)",
            ("tokens", "less", "more", "neither"),
            [(modality, *map(str, each)) for modality, each in counts.items()],
        ),
        Table(
            "Thresholds less auxiliary routers",
            ("condition", *(f"{m}, nat" for m in MODALITIES), "F1"),
            [
                (
                    name,
                    *(signed(difference["loss"][modality]) for modality in MODALITIES),
                    ", ".join(f"{kind} {signed(each)}" for kind, each in difference["f1"].items())
                    if "f1" in difference
                    else "–",
                )
                for name, difference in found
            ],
            is_long=True,
        ),
    ]


def _generation(part: Mapping[str, Any]) -> Iterator[Table]:
    for split, tasks in part.get("splits", {}).items():
        rows = []
        for task, found in tasks.items():
            for policy, row in found["policies"].items():
                is_best = policy == found["best"]
                p = "best" if is_best else f"{row['p']:.3f}"
                verdict = "worse" if row["is_worse"] else "not worse"
                counts = (str(row["only_this"]), str(row["only_best"]))
                rows.append((task, policy, percent(row["score"]), *counts, p, verdict))
        yield Table(
            f"Tasks on {_NAMES[split]}, {part['samples'][split]} items, one try each",
            ("task", "policy", "right", "only this one", "only the best", "McNemar p", ""),
            rows,
        )


def _better_routers(part: Mapping[str, Any]) -> Iterator[Table]:
    for split, found in part.get("splits", {}).items():
        rows = []
        for name, each in found.items():
            about = part["about"][name]
            cells = [
                name,
                str(about.get("steps", "–")),
                f"{about['parameters']:,}" if "parameters" in about else "–",
            ]
            for measure in ("accuracy", "f1"):
                cells.append(
                    ", ".join(
                        f"{kind} {interval(row[measure], 3)}"
                        for kind, row in each["agreement"].items()
                    )
                )
            cells += [
                signed(each["loss"][m]["delta"]) if m in each["loss"] else "–" for m in MODALITIES
            ]
            rows.append(tuple(cells))
        yield Table(
            f"Ways to fit what selects, {_NAMES[split]}: loss above expert choice in nat",
            ("fit", "steps", "parameters", "accuracy", "F1", *MODALITIES),
            rows,
        )
