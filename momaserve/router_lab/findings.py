"""What a report says in sentences: short answers to the questions that it was made for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from momaserve.router_lab.losses import MARGIN_NAT, MARGIN_SHARE, MODALITIES

_MARGIN = f"{100 * MARGIN_SHARE:g} % or {MARGIN_NAT:g} nat, whichever is more"
_SENSITIVE_AT = 0.005
"""Of depth decisions, above which the paper saw mixture of depths lose (MoMa, 2407.21770)."""
_FEW = 0.1
"""Share of conditions that chance alone might tell apart."""
_SINGULAR = {"experts": "expert", "depth": "depth"}
_NAMES = {"train": "training data", "held_out": "held-out data"}


def findings(parts: Mapping[str, Any]) -> list[dict[str, str]]:
    """`question`, `answer` and, where there is more to say, `detail` of every part there is."""
    writers: tuple[tuple[str, Callable[[Any], Iterator[dict[str, str]]]], ...] = (
        ("policies", _of_policies),
        ("generation", _of_generation),
        ("noise", _of_noise),
    )
    found = [each for name, write in writers if name in parts for each in write(parts[name])]
    return [*found, *_own_mistakes(parts), *_which_to_serve(parts)]


def signed(estimate: Mapping[str, float | None], digits: int = 4, unit: str = "") -> str:
    """A difference and its interval, as "+0.0012 nat (-0.0003 to +0.0030)"."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return "unknown"
    text = f"{value:+.{digits}f}{unit}"
    if low is None or high is None:
        return text
    return f"{text} ({low:+.{digits}f} to {high:+.{digits}f})"


def _finding(question: str, answer: str, detail: str = "") -> dict[str, str]:
    return {"question": question, "answer": answer, "detail": detail}


def _of_policies(part: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for split, found in part["splits"].items():
        ways = found["agreement"]["at_expert_choice"]
        if "causal" in ways:
            yield _agreement(split, ways)
    for split, found in part["splits"].items():
        if "causal" not in found["loss"]:
            continue
        causal = found["loss"]["causal"]
        verdicts = {m: causal[m]["kept"] for m in ("text", "image") if m in causal}
        if not verdicts:
            continue
        if all(verdict == "yes" for verdict in verdicts.values()):
            answer = "Yes."
        elif "no" not in verdicts.values():
            answer = "Likely: the differences are small enough, but an interval reaches further."
        else:
            worse = [m for m, verdict in verdicts.items() if verdict == "no"]
            answer = f"No: {' and '.join(worse)} tokens lose more than that."
        detail = "; ".join(
            f"{m} {signed(causal[m]['delta'], unit=' nat')} on "
            f"{found['loss']['expert_choice'][m]['nll']['value']:.4f}"
            for m in verdicts
        )
        question = f"Does causal routing keep the loss of expert choice on {_NAMES[split]}?"
        yield _finding(question, answer, f"{detail}. Kept is a rise of at most {_MARGIN}.")


def _agreement(split: str, ways: Mapping[str, Any]) -> dict[str, str]:
    def said(policy: str) -> str:
        return ", ".join(
            f"{kind} {100 * row['accuracy']['value']:.2f} % (F1 {row['f1']['value']:.4f})"
            for kind, row in ways[policy].items()
        )

    others = [f"{policy}: {said(policy)}" for policy in ("calibrated",) if policy in ways]
    question = f"How many decisions do auxiliary routers make rightly on {_NAMES[split]}?"
    return _finding(question, f"{said('causal')}.", "; ".join(others))


def _of_generation(part: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for split, tasks in part.get("splits", {}).items():
        worse, scores = [], []
        for task, found in tasks.items():
            row = found["policies"].get("causal")
            if row is None:
                continue
            best = found["best"]
            scores.append(f"{task} {100 * row['score']:.1f} %")
            if row["is_worse"]:
                top = 100 * found["policies"][best]["score"]
                worse.append(f"{task} ({best} {top:.1f} %, p = {row['p']:.3f})")
        if scores:
            answer = f"Yes, at {'; '.join(worse)}." if worse else "No, at none."
            question = f"Is causal routing worse than the best at a task on {_NAMES[split]}?"
            yield _finding(question, answer, f"Causal: {', '.join(scores)}. McNemar's test, 5 %.")


def _of_noise(part: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    floors = part["floor"].get("expert_choice", {})
    for curve in part["curves"]:
        if (curve["base"], curve["kind"]) != ("expert_choice", "uniform"):
            continue
        name = _SINGULAR[curve["part"]]
        one = curve["one_percent"]["all"]["value"]
        answer = (
            "Of none that was tried."
            if one is None
            else f"Of {100 * one:.2f} % {_range(curve['one_percent']['all'])}."
        )
        at = next((p for p in curve["points"] if p["sigma"] == _SENSITIVE_AT), None)
        detail = ""
        if at is not None:
            delta = at["loss"]["all"]["delta"]
            detail = f"At {100 * _SENSITIVE_AT:g} % the loss moves by {signed(delta, unit=' nat')}."
        if floors.get(curve["part"]) is not None:
            detail += f" bf16 rounding alone turns {100 * floors[curve['part']]:.2f} %."
        yield _finding(f"Of how many wrong {name} decisions is the loss 1 % up?", answer, detail)
        if "loses_to_baseline" in curve:
            loses = curve["loses_to_baseline"]["all"]
            if loses["value"] is None:
                answer = "At none that was tried."
            elif loses["value"] == 0:
                answer = f"It is better without any {_range(loses)}."
            else:
                answer = f"At {100 * loses['value']:.2f} % {_range(loses)}."
            question = f"At how many wrong {name} decisions is the model without depth better?"
            yield _finding(question, answer)


def _own_mistakes(parts: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Whether what routers get wrong hurts as much as as many decisions taken at random."""
    split = parts.get("policies", {}).get("splits", {}).get("train", {})
    rates = split.get("error_rate", {}).get("causal")
    if rates is None or "noise" not in parts:
        return
    cost = split["loss"]["causal"]["all"]["delta"]
    random = {}
    for curve in parts["noise"]["curves"]:
        if (curve["base"], curve["kind"]) == ("expert_choice", "uniform"):
            points = [(p["sigma"], p["loss"]["all"]["delta"]["value"]) for p in curve["points"]]
            random[curve["part"]] = _between(points, rates[curve["part"]])
    total = sum(random.values())
    is_clear = cost["high"] is not None and cost["high"] < total
    each = "; ".join(
        f"{100 * rates[part]:.2f} % of {_SINGULAR[part]} decisions are wrong, and as many turned "
        f"at random cost {value:+.4f} nat"
        for part, value in random.items()
    )
    yield _finding(
        "Do the auxiliary routers' own mistakes hurt as much as random ones?",
        "No, less: they are made near the cut." if is_clear else "That cannot be told apart.",
        f"Causal routing costs {signed(cost, unit=' nat')}; {each}.",
    )


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """On straight lines between points of rising x, and the last one's beyond them."""
    for (left, low), (right, high) in pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return points[-1][1]


def _range(estimate: Mapping[str, float | None]) -> str:
    low, high = estimate["low"], estimate["high"]
    if low is None:
        return ""
    most = "more than was tried" if high is None else f"{100 * high:.2f} %"
    return f"({100 * low:.2f} to {most})"


def comparisons(parts: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every condition in which both servable policies were measured, with their difference."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for split, each in parts.get("policies", {}).get("splits", {}).items():
        found.append((_NAMES[split], each["served_difference"]))
    for each in parts.get("noise", {}).get("served_difference", []):
        part = _SINGULAR[each["part"]]
        found.append((f"{100 * each['sigma']:g} % noise in {part} decisions", each))
    for name, each in parts.get("shift", {}).get("shifts", {}).items():
        for point in each["points"]:
            title = f"{name}, {point['severity']:g} ({each['unit']})"
            found.append((title, point["served_difference"]))
    return [(name, difference) for name, difference in found if "loss" in difference]


def tally(differences: Iterable[Mapping[str, Any]]) -> dict[str, list[int]]:
    """By modality: in how many conditions thresholds have clearly less loss, more, or neither."""
    counts: dict[str, list[int]] = {}
    for difference in differences:
        for modality in MODALITIES:
            estimate = difference["loss"][modality]
            if estimate["low"] is None:
                continue
            place = 0 if estimate["high"] < 0 else 1 if estimate["low"] > 0 else 2
            counts.setdefault(modality, [0, 0, 0])[place] += 1
    return counts


def _which_to_serve(parts: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """What the plain data says; where it says nothing, what most of noise and shift do."""
    found = comparisons(parts)
    plain = [(name, each) for name, each in found if name in _NAMES.values()]
    everywhere = tally(each for _, each in found).get("all")
    if everywhere is None:
        return
    better, worse, _ = tally(each for _, each in plain).get("all", [0, 0, 0])
    if better == worse == 0:
        better, worse, even = everywhere
        is_rare = max(better, worse) <= _FEW * (better + worse + even)
        if is_rare or max(better, worse) <= 2 * min(better, worse):
            better = worse = 0
    if better and not worse:
        answer = "Calibrated thresholds: less loss, and no extra router to compute."
    elif worse and not better:
        answer = "Causal: auxiliary routers have less loss."
    elif better:
        answer = "It depends on the data."
    else:
        answer = "Either: there is no clear difference, and thresholds cost less compute."
    shown = [
        f"{name}: " + ", ".join(f"{m} {signed(d)}" for m, d in each["loss"].items())
        for name, each in plain
    ]
    yield _finding(
        "Which should be served, auxiliary routers (causal) or calibrated thresholds?",
        answer,
        f"Of {sum(everywhere)} conditions (data, noise, shift), thresholds have clearly less loss "
        f"in {everywhere[0]}, auxiliary routers in {everywhere[1]}. Loss of thresholds less that "
        f"of routers, in nat: {'; '.join(shown)}.",
    )
